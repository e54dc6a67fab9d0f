"""Pretraining on next tokens. Variants are the model presets: configs/pretrain.py:gpt2, :llama3.2-1b, ..."""

from configs.common import model_settings, text_data, training
from jaxllm.models.presets import preset


def get_config(variant=None):
    c = training(steps=600, batch_size=32, lr=3e-3, eval_every=200)
    c.optim.warmup = 20
    model = preset(variant or "tiny")
    text_data(c, length=64 if variant is None else model.max_length, vocab_size=model.vocab_size)
    c.model = model_settings(model)
    if variant is not None:
        c.optim.lr, c.optim.warmup, c.steps, c.batch_size, c.log_every = 3e-4, 2000, 100_000, 256, 100
    return c
