"""Reward models against demonstrations: small policies after RLHF, large ones after supervised tuning on noisy demonstrations."""

import ml_collections


def get_config(variant=None):
    c = ml_collections.ConfigDict()
    full = variant == "full"
    c.seed = 0
    c.seeds = 10 if full else 3
    c.widths = (16, 32, 64, 128, 256) if full else (8, 16, 32)  # of the policies; parameters go with the square
    c.noise = (0.0, 0.25, 0.5, 0.75, 1.0) if full else (0.0, 0.5, 0.9)  # of demonstrations, the share that is careless
    c.control = 0.5  # the noise at which a reward model on shuffled labels is tried
    c.judge_width = 128 if full else 48
    c.prompt = 4 if full else 0  # words that a prompt names; 0: the world's are good (small judges cannot read prompts)
    c.length = 24 if full else 12  # words of a string
    c.best_of = 16  # strings of the source, of which a careful demonstrator hands in the best
    c.demonstrations = 20_000 if full else 4096
    c.sft_steps = 2000 if full else 300
    c.sft_batch = 256 if full else 64
    c.pairs = 20_000 if full else 5000
    c.judge_steps = 2000 if full else 400
    c.steps = 300 if full else 50  # of reinforcement learning
    c.batch_size = 256 if full else 96
    c.lr = 2e-3  # supervised
    c.rl_lr = 5e-4
    c.kl_coef = 0.05
    c.looks = 2048 if full else 512  # prompts on which policies are compared
    return c
