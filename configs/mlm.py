"""Masked-language modelling. Variants: tiny-nsp, bert-base, bert-large (with next sentences), roberta-base, roberta-large."""

import dataclasses

from configs.common import model_settings, text_data, training
from jaxllm.core.types import UserError
from jaxllm.models.encoder import PRESETS

VARIANTS = {**PRESETS, "tiny-nsp": dataclasses.replace(PRESETS["tiny"], pooler=True)}


def get_config(variant=None):
    name = variant or "tiny"
    if name not in VARIANTS:
        raise UserError(f"unknown variant {name!r}: choose one of {', '.join(VARIANTS)}")
    model, small = VARIANTS[name], name.startswith("tiny")
    c = training(steps=800, batch_size=32, lr=2e-3, eval_every=400)
    c.optim.warmup = 40
    c.objective = "mlm+nsp" if model.pooler else "mlm"
    c.masking = "dynamic"  # drawn anew at every step, or static: drawn once
    c.mask_rate = 0.15
    text_data(c, length=64 if small else model.max_length, vocab_size=model.vocab_size)  # cls and mask come on top
    c.model = model_settings(model)
    if not small:  # arXiv 1810.04805, A.2; arXiv 1907.11692, table 9
        c.optim.lr, c.optim.warmup, c.steps, c.batch_size = 1e-4, 10_000, 1_000_000, 256
        c.log_every, c.eval_every, c.optim.weight_decay = 100, 10_000, 0.01
    if name.startswith("roberta"):
        c.optim.lr, c.optim.warmup, c.steps, c.batch_size, c.optim.b2 = 6e-4, 24_000, 500_000, 8192, 0.98
    return c
