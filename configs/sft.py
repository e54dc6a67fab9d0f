"""Supervised fine-tuning on conversations."""

import ml_collections

from configs.common import lora, training


def get_config(variant=None):
    c = training(steps=1000, batch_size=32, lr=3e-3, log_every=20, eval_every=500)
    c.optim.warmup = 20
    lora(c)
    c.init = ""  # a pretraining run, <dir>[@step]; empty: train one first
    c.data = ml_collections.ConfigDict()
    c.data.path = ""  # rows with messages, or prompt and completion; empty: demonstrations of the instr world
    c.data.on_error = "stop"  # at a bad row; or skip: leave out at most 1 % of the rows
    c.data.rows = 24_000  # demonstrations, when path is empty
    c.data.length = 64
    c.data.held_out = 0.02
    return c
