"""Iterative DPO: six rounds of fresh pairs against one set of as many labels, and against six times as many passes over it."""

import ml_collections


def get_config(variant=None):
    c = ml_collections.ConfigDict()
    full = variant == "full"
    c.seed = 0
    c.seeds = 10 if full else 3
    c.length = 32 if full else 12  # words of a string
    c.width = 128 if full else 32
    c.layers = 4 if full else 1
    c.pretrain_steps = 2000 if full else 300
    c.judge_steps = 400 if full else 150
    c.rounds = 6
    c.pairs = 2000 if full else 500  # a round; the offline set has as many as all rounds
    c.steps = 125 if full else 24  # a round: three or four passes
    c.more_passes = 6
    c.batch_size = 64
    c.lr = 5e-4
    c.betas = (0.03, 0.1, 0.3) if full else (0.1, 0.3)
    c.sharpness = 2.0  # of the simulated annotator: Bradley-Terry on this times the gap in gold (in s.d.)
    c.test_pairs = 2048 if full else 256
    return c
