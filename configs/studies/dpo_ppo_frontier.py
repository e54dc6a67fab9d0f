"""The frontier of reward against KL: DPO, PPO, best-of-n and fine-tuning on the same pairs."""

import ml_collections


def get_config(variant=None):
    c = ml_collections.ConfigDict()
    full = variant == "full"
    c.seed = 0
    c.seeds = 10 if full else 3
    c.length = 12  # words of a string
    c.width = 64 if full else 48
    c.judge_width = 64
    c.layers = 2
    c.pretrain_steps = 1000 if full else 300
    c.pairs = 5000 if full else 1000  # the same for every method
    c.judge_steps = 150
    c.lr = 5e-4
    c.betas = (0.03, 0.05, 0.1, 0.3, 1.0) if full else (0.05, 0.1, 0.3, 1.0)
    c.control_beta = 0.1  # DPO with this beta on shuffled labels; among `betas`
    c.alphas = (0.0, 0.3, 1.0, 3.0) if full else (0.0, 0.3, 1.0)  # of unlikelihood; 0 is preferred fine-tuning
    c.steps = 400 if full else 120  # of DPO and fine-tuning
    c.every = 20
    c.batch_size = 128 if full else 64  # pairs
    c.kl_coefs = (0.0, 0.02, 0.05, 0.1, 0.3, 1.0) if full else (0.02, 0.05, 0.1, 0.3)
    c.rl_steps = 160 if full else 48
    c.rl_every = 8 if full else 6
    c.rl_batch = 192 if full else 96  # strings
    c.epochs = 2
    c.best_of = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    c.strings = 32_768 if full else 8192  # strings that best-of-n chooses from
    c.look = 4096 if full else 384  # strings that choose, and as many that measure
    c.limit = 15.0  # nats: hull areas go so far
    return c
