"""Iterative DPO: fresh pairs from the latest policy in every round."""

import ml_collections


def get_config(variant=None):
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.init = ""  # an SFT run, <dir>[@step]; empty: train one first
    c.rounds = 3
    c.prompts = 768  # of the instr world; a file is used whole
    c.samples = 4  # completions a prompt and round
    c.judge = "annotator"  # annotator (simulated, instr world), rewards (see configs/grpo.py), reward_model
    c.rewards = ""  # of judge=rewards; empty: the verifier of the tasks
    c.reward_model = ""  # of judge=reward_model: a run; empty: train one first
    c.select = "best_and_worst"  # best_and_worst, best_and_other (a random lower one)
    c.loss = "dpo"  # any of configs/dpo.py
    c.beta = 0.2
    c.nll_weight = 0.2
    c.steps = 40  # of DPO, each round
    c.batch_size = 64
    c.lr = 2e-4
    c.sample_batch = 128
    c.temperature = 1.0
    c.max_prompt = 0  # 0: what the context leaves; longer prompts are left out
    c.max_new_tokens = 0  # 0: 36 in the instr world, 128 for a file
    c.data = ml_collections.ConfigDict()
    c.data.path = ""  # rows with a prompt (and answer), or preference rows, whose prompts are taken; empty: the instr world
    c.data.on_error = "stop"  # at a bad row; or skip: leave out at most 1 % of the rows
    return c
