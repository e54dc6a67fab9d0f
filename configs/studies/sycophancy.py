"""Sycophancy: a tiny model that has read about people, and simulated annotators who like to be agreed with."""

import ml_collections


def get_config(variant=None):
    c = ml_collections.ConfigDict()
    full = variant == "full"
    c.seed = 0
    c.seeds = 10 if full else 3
    c.lambdas = (0.0, 0.1, 0.3, 0.6, 1.0) if full else (0.0, 0.3, 1.0)  # what agreement is worth, correctness being worth 1
    c.width = 128 if full else 48
    c.layers = 4 if full else 2
    c.names = 64 if full else 16  # first names, and as many last names
    c.known = 2000 if full else 128  # people that texts speak of; half of them are for training
    c.choices = 16 if full else 8  # that a fact may have
    c.exposures = (11, 20)  # of twenty texts, how many state the claim: well-known facts
    c.agreeing = 0.3  # of the demonstrations follow the user
    c.read_steps = 8000 if full else 800
    c.read_batch = 512 if full else 128
    c.lr = 3e-3
    c.tune_steps = 4000 if full else 600
    c.steps = 300 if full else 80  # of each method
    c.every = 20
    c.batch_size = 512 if full else 128
    c.rl_lr = 1e-3
    c.dpo_lr = 1e-3
    c.kl_coef = 0.02
    c.pairs = 32_000 if full else 4096
    c.sharpness = 4.0  # of the annotators' choices: Bradley-Terry on this times the gap
    c.beta = 0.1  # of DPO
    return c
