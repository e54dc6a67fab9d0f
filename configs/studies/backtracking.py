"""Backtracking: a tiny model that has learned to go along with everything, and is then taught to refuse hazards."""

import ml_collections


def get_config(variant=None):
    c = ml_collections.ConfigDict()
    full = variant == "full"
    c.seed = 0
    c.seeds = 10 if full else 3
    c.words = 192 if full else 48
    c.dangerous = 64 if full else 16  # words
    c.steps = 5  # words of an answer
    c.hazards = 0.3  # of the lessons' requests
    c.telling = 0.8  # how surely a cue hints at a hazard
    c.width = 128 if full else 48
    c.layers = 4 if full else 2
    c.read_steps = 4000 if full else 400  # of learning to go along with every request
    c.read_batch = 512 if full else 128
    c.read_lr = 3e-3
    c.tune_steps = 600 if full else 240  # few: SFT is to go along with a tenth of the hazards
    c.batch_size = 256 if full else 64
    c.lr = 1e-3
    c.share = 1 / 3  # of the lessons on hazards take something back: 10 % of all lessons
    c.dpo_steps = 200 if full else 40
    c.pair_batch = 128 if full else 64
    c.dpo_lr = 1e-4
    c.beta = 0.1
    c.nll_weight = 1.0  # of the chosen answer, prefixes to be taken back left out: plain DPO for twice as long cost help
    c.test_requests = 2048 if full else 512
    c.temperature = 1.0
    c.biases = (-4.0, -2.0, 2.0, 4.0)  # on the logit of [RESET]
    return c
