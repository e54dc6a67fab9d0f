"""Reward models on the world of token strings: how many comparisons, from which start, pairs or rankings."""

import ml_collections


def get_config(variant=None):
    c = ml_collections.ConfigDict()
    full = variant == "full"
    c.seed = 0
    c.seeds = 10 if full else 5
    c.pairs = (100, 300, 1000, 3000, 10_000, 30_000) if full else (100, 500, 2000, 10_000)
    c.test_pairs = 4096 if full else 512
    c.width = 128 if full else 32
    c.layers = 4 if full else 2
    c.length = 32 if full else 12  # words of a string
    c.pretrain_steps = 2000 if full else 300  # of the language model that a reward model may start from
    c.steps = 480 if full else 160
    c.batch_size = 64  # pairs
    c.lr = 1e-3
    c.every = 20  # steps between looks
    c.rankings = 2000 if full else 400
    c.k = 5  # completions of a ranking
    c.passes = 2  # over the rankings
    c.sharpness = 2.0  # of the simulated annotator: Bradley-Terry on this times the gap in gold (in s.d.)
    return c
