"""PPO against a reward model. A step is an iteration: one rollout and `epochs` passes over it."""

import ml_collections

from configs.common import lora, training


def get_config(variant=None):
    c = training(steps=50, batch_size=128, lr=3e-4, log_every=1)
    c.optim.weight_decay = 0.0
    c.init = ""  # an SFT run, <dir>[@step]; empty: train one first
    c.reward_model = ""  # a reward run, <dir>[@step]; empty: train one first
    c.kl_coef = 0.2
    c.kl_target = 0.0  # nats an answer that the coefficient is adapted to (arXiv 1909.08593); 0: it stays kl_coef
    c.loss = "ppo"  # ppo, dual_clip
    c.clip = 0.2
    c.dual = 3.0  # of dual_clip: the largest ratio by which a bad token counts
    c.value_clip = 0.2
    c.value_coef = 0.5
    c.gamma = 1.0
    c.lam = 0.95
    c.epochs = 2
    c.minibatches = 2
    c.ptx_coef = 0.0  # of the mean negative log-probability of pretraining text (PPO-ptx, arXiv 2203.02155)
    c.missing_eos_penalty = 1.0
    c.temperature = 1.0
    c.max_prompt = 32
    c.max_new_tokens = 36
    lora(c)
    c.data = ml_collections.ConfigDict()
    c.data.path = ""  # rows with a prompt; empty: prompts of the instr world
    c.data.on_error = "stop"  # at a bad row; or skip: leave out at most 1 % of the rows
    c.data.rows = 8192
    c.data.ptx = ""  # text for ptx_coef; empty: what pretraining has built in
    return c
