"""Forgetting: RL on a learned reward, with KL penalties, with pretraining text mixed in, with neither."""

import ml_collections


def get_config(variant=None):
    c = ml_collections.ConfigDict()
    full = variant == "full"
    c.seed = 0
    c.seeds = 10 if full else 3
    c.length = 12  # words of a string; a copied pattern has a quarter of it
    c.width = 64 if full else 48
    c.layers = 2
    c.pretrain_steps = 3000 if full else 800  # half of the rows are strings, half copies
    c.pairs = 1000
    c.judge_steps = 150
    c.lr = 5e-4
    c.kl_coefs = (0.0, 0.05, 0.3)
    c.ptx_coefs = (0.1, 0.3, 1.0) if full else (0.3, 1.0)  # weight of the pretraining loss, with kl_coef 0
    c.batch_size = 96  # strings a step of RL, and rows of pretraining text
    c.epochs = 2
    c.steps = 160 if full else 60
    c.every = 10 if full else 5
    c.look = 4096 if full else 512
    return c
