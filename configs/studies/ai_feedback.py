"""AI feedback: two widths of models that write and rate, a pool of four of them, DPO on what a judge prefers."""

import ml_collections


def get_config(variant=None):
    c = ml_collections.ConfigDict()
    full = variant == "full"
    c.seed = 0
    c.seeds = 10 if full else 3
    c.length = 12  # words of a string
    c.prompt = 4 if full else 0  # good words that a prompt names; 0: they are the world's. Small models do not learn to read it
    c.width = 64 if full else 16  # of the small models; the large ones have twice that
    c.layers = 2
    c.rows = 65_536 if full else 8192  # strings of each kind that models learn from
    c.bias = 1.5  # log-odds for good words of the better half of the demonstrations
    c.noise = 0.5  # s.d. of the teacher's ratings, before rounding
    c.lr = 2e-3 if full else 3e-3
    c.steps = 6000 if full else 400
    c.batch_size = 64  # strings, or pairs
    c.pairs = 8192 if full else 1024
    c.test = 4096 if full else 1024  # held-out prompts
    c.dpo_lr = 3e-4 if full else 5e-4
    c.beta = 0.1
    c.dpo_steps = 400 if full else 120
    c.looks = 4
    c.rounds = 3  # of self-rewarding
    c.round_prompts = 2048 if full else 256
    c.round_steps = 100 if full else 30
    return c
