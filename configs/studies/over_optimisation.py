"""Over-optimisation: reward models on few and many pairs, optimised by RL and by best-of-n."""

import ml_collections


def get_config(variant=None):
    c = ml_collections.ConfigDict()
    full = variant == "full"
    c.seed = 0
    c.seeds = 10 if full else 5
    c.length = 12  # words of a string
    c.width = 64 if full else 48
    c.layers = 2
    c.pretrain_steps = 1000 if full else 300
    c.pairs = (100, 300, 1000, 3000, 10_000) if full else (100, 1000, 5000)  # that a reward model learns from
    c.main_pairs = 1000  # with these the KL penalties and the shuffled labels are tried; among `pairs`
    c.judge_widths = (16, 32, 64) if full else (64,)  # the last one is tried with KL penalties
    c.judge_steps = 150
    c.judge_batch = 64
    c.kl_coefs = (0.02, 0.05, 0.1, 0.3) if full else (0.05, 0.2)
    c.lr = 5e-4
    c.batch_size = 192 if full else 96  # strings a step of RL
    c.epochs = 2
    c.steps = 160 if full else 48
    c.every = 4  # steps between looks
    c.look = 4096 if full else 512  # strings a look
    c.strings = 32_768 if full else 8192  # strings that best-of-n chooses from
    c.best_of = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if full else (1, 2, 4, 8, 16, 32, 64, 128, 256)
    c.match = 64  # best-of-this-many is compared with RL at equal proxy; among `best_of`
    return c
