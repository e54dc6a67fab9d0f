"""A reward model from pairs (Bradley-Terry)."""

import ml_collections

from configs.common import training


def get_config(variant=None):
    c = training(steps=120, batch_size=64, lr=5e-4)
    c.optim.warmup = 5
    c.init = ""  # an SFT run, <dir>[@step]; empty: train one first
    c.center = 0.01
    c.data = ml_collections.ConfigDict()
    c.data.path = ""  # preference rows; empty: pairs from the SFT run, judged by the simulated annotator
    c.data.eval_path = ""  # rows kept for judging; empty: a tenth of path's
    c.data.length = 64
    return c
