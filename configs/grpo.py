"""GRPO and its siblings. A step is an iteration: one rollout of `group` completions a prompt and `epochs` passes over it.

Variants: grpo (the default), dr_grpo, dapo, gspo, cispo, rloo, reinforce_pp, remax.
"""

import ml_collections

from configs.common import lora, training

VARIANTS = {
    "grpo": {},
    "dr_grpo": dict(advantage="dr_grpo", normalise="constant", kl="none"),
    "dapo": dict(clip=(0.2, 0.28), normalise="token_mean", kl="none", overlong="shape", batch_size=64, groups=16),
    "gspo": dict(loss="gspo", clip=(3e-4, 4e-4), kl="none"),
    "cispo": dict(loss="cispo", clip=(0.0, 4.0), normalise="token_mean", kl="none"),
    "rloo": dict(advantage="rloo", kl="reward", normalise="constant", minibatches=1),
    "reinforce_pp": dict(advantage="reinforce_pp", kl="reward", kl_coef=0.01, normalise="token_mean"),
    "remax": dict(advantage="remax", loss="reinforce", kl="reward", normalise="constant", minibatches=1, group=1, batch_size=128),
}


def get_config(variant=None):
    c = training(steps=100, batch_size=16, lr=3e-4, log_every=1)  # batch_size: prompts
    c.optim.weight_decay = 0.0
    c.init = ""  # an SFT run, <dir>[@step]; empty: train one first, on the file's own solutions where it has them
    c.rewards = ""  # "numeric + 0.2*format:PATTERN + my.py:reward"; empty: the verifier of the tasks
    c.group = 8  # completions a prompt
    c.groups = 0  # groups that train; below batch_size: dynamic sampling, prompts are drawn until so many are informative
    c.advantage = "grpo"  # grpo, dr_grpo, rloo, reinforce_pp, remax, batch_mean
    c.loss = "clipped"  # clipped, gspo, cispo, dual_clip, reinforce
    c.clip = (0.2, 0.2)  # below and above 1; cispo: (-, most weight - 1), dual_clip: (clip, dual)
    c.normalise = "sequence_mean"  # sequence_mean, token_mean, constant
    c.kl = "k3"  # k2, k3 (losses), reward (k1, in the reward), none
    c.kl_coef = 0.04
    c.epochs = 1
    c.minibatches = 2
    c.temperature = 1.0
    c.top_p = 1.0
    c.importance_cap = 0.0  # above 0: truncated importance sampling between sampler and trainer
    c.overlong = "keep"  # what becomes of completions without an end: keep, mask, shape (a penalty near the longest length)
    c.max_prompt = 0  # 0: what the context leaves; longer prompts are left out
    c.max_new_tokens = 0  # 0: 36 in the instr world, else what 95 % of the file's solutions fit in
    c.slots = 0  # rows decoded at once (on each device of mesh.data), others take their place as they end; 0: all of a rollout
    lora(c)
    c.data = ml_collections.ConfigDict()
    c.data.path = ""  # rows of GSM8K, or with prompt and answer; empty: tasks of the instr world
    c.data.on_error = "stop"  # at a bad row; or skip: leave out at most 1 % of the rows
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"no variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    c.update(VARIANTS[variant or "grpo"])
    return c
