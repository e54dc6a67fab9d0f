"""A reward model from pairs or rankings (Bradley-Terry)."""

import ml_collections

from configs.common import lora, training


def get_config(variant=None):
    c = training(steps=120, batch_size=64, lr=5e-4)
    c.optim.warmup = 5
    lora(c)
    c.init = ""  # an SFT run, <dir>[@step]; empty: train one first
    c.center = 0.01
    c.ranking = "kwise"  # how rankings are read: kwise (all pairs), plackett_luce
    c.data = ml_collections.ConfigDict()
    c.data.path = ""  # pairs, with or without `margin`, or rankings; empty: the SFT run's, judged by the simulated annotator
    c.data.on_error = "stop"  # at a bad row; or skip: leave out at most 1 % of the rows
    c.data.eval_path = ""  # rows kept for judging; empty: a tenth of path's
    c.data.length = 64
    return c
