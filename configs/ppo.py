"""PPO against a reward model. A step is an iteration: one rollout and `epochs` passes over it."""

import ml_collections

from configs.common import training


def get_config(variant=None):
    c = training(steps=50, batch_size=128, lr=3e-4, log_every=1)
    c.optim.weight_decay = 0.0
    c.init = ""  # an SFT run, <dir>[@step]; empty: train one first
    c.reward_model = ""  # a reward run, <dir>[@step]; empty: train one first
    c.kl_coef = 0.2
    c.clip = 0.2
    c.value_clip = 0.2
    c.value_coef = 0.5
    c.gamma = 1.0
    c.lam = 0.95
    c.epochs = 2
    c.minibatches = 2
    c.missing_eos_penalty = 1.0
    c.temperature = 1.0
    c.max_prompt = 32
    c.max_new_tokens = 36
    c.data = ml_collections.ConfigDict()
    c.data.path = ""  # rows with a prompt; empty: prompts of the instr world
    c.data.rows = 8192
    return c
