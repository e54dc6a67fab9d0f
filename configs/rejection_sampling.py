"""Expert iteration: sample, keep what is right, fine-tune on it, again. Variants: star (the default), latest, control."""

import ml_collections

VARIANTS = {"star": {}, "latest": dict(train_from="latest"), "control": dict(select="unfiltered")}


def get_config(variant=None):
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.init = ""  # an SFT run, <dir>[@step]; empty: train one first, on the file's own solutions where it has them
    c.rounds = 3
    c.prompts = 512  # of the instr world; a file is used whole
    c.samples = 8  # completions a prompt
    c.rewards = ""  # see configs/grpo.py; empty: the verifier of the tasks
    c.right = 0.5  # a completion is right from this reward on
    c.select = "shortest"  # shortest, at_random, longest, every (right one), unfiltered (the control)
    c.train_from = "base"  # base (STaR) or latest
    c.steps = 100  # of fine-tuning, each round
    c.batch_size = 32
    c.lr = 1e-3
    c.sample_batch = 128
    c.temperature = 1.0
    c.max_prompt = 0  # 0: what the context leaves; longer prompts are left out
    c.max_new_tokens = 0  # 0: 36 in the instr world, else what 95 % of the file's solutions fit in
    c.data = ml_collections.ConfigDict()
    c.data.path = ""  # rows of GSM8K, or with prompt and answer; empty: tasks of the instr world
    c.data.on_error = "stop"  # at a bad row; or skip: leave out at most 1 % of the rows
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"no variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    c.update(VARIANTS[variant or "star"])
    return c
