"""Recurrent language models. Variants: zaremba-medium, zaremba-large; elmo and tiny-elmo read in both directions."""

import dataclasses

import ml_collections

from configs.common import text_data, training
from jaxllm.core.types import UserError
from jaxllm.models.recurrent import PRESETS, BiLSTMConfig


def get_config(variant=None):
    name = variant or "tiny"
    if name not in PRESETS:
        raise UserError(f"unknown variant {name!r}: choose one of {', '.join(PRESETS)}")
    model, small = PRESETS[name], name.startswith("tiny")
    c = training(steps=600, batch_size=32, lr=4e-3, eval_every=200)
    c.optim.warmup = 20
    c.family = "elmo" if isinstance(model, BiLSTMConfig) else "lstm"
    text_data(c, length=64 if small else model.max_length, vocab_size=model.vocab_size)
    fields = dataclasses.asdict(model)
    del fields["vocab_size"]  # the tokenizer's
    c.model = ml_collections.ConfigDict(fields)
    if not small:
        c.optim.lr, c.optim.warmup, c.steps, c.batch_size, c.log_every, c.eval_every = 1e-3, 500, 50_000, 128, 100, 5000
    return c
