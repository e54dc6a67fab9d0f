"""Calibrated reward: a tiny model that has read about people, paid for right answers, wrong ones, hedged ones, abstentions."""

import ml_collections


def get_config(variant=None):
    c = ml_collections.ConfigDict()
    full = variant == "full"
    c.seed = 0
    c.seeds = 10 if full else 3
    c.width = 128 if full else 48
    c.layers = 4 if full else 2
    c.names = 64 if full else 32  # first names, and as many last names
    c.known = 2000 if full else 160  # people that texts speak of; half of them are for training
    c.unknown = 1000 if full else 80  # people that no text speaks of
    c.choices = 16 if full else 8  # that a fact may have
    c.read_steps = 8000 if full else 1500
    c.read_batch = 512 if full else 128
    c.lr = 3e-3
    c.tune_steps = 400 if full else 200  # supervised, in all three styles at random
    c.steps = 300 if full else 100  # of reinforcement learning
    c.every = 20
    c.batch_size = 512 if full else 128
    c.rl_lr = 1e-3
    c.kl_coef = 0.02
    c.unknown_share = 0.33  # of questions in training
    return c
