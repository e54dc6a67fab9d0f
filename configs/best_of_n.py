"""Best of n by a verifier or a reward model: what n samples buy, for every n up to the number drawn."""

import ml_collections


def get_config(variant=None):
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.init = ""  # an SFT run, <dir>[@step]; empty: train one first, on the file's own solutions where it has them
    c.reward_model = ""  # a reward run that chooses, <dir>[@step]; empty: the verifier itself chooses
    c.rewards = ""  # what the chosen are judged by, see configs/grpo.py; empty: the verifier of the tasks
    c.prompts = 128
    c.samples = 64  # completions a prompt: the largest n
    c.sample_batch = 256
    c.temperature = 1.0
    c.int8 = False  # draw with the kernels of attention and feed-forward rounded to int8
    c.max_prompt = 0  # 0: what the context leaves; longer prompts are left out
    c.max_new_tokens = 0  # 0: 36 in the instr world, else what 95 % of the file's solutions fit in
    c.data = ml_collections.ConfigDict()
    c.data.path = ""  # rows of GSM8K, or with prompt and answer; empty: tasks of the instr world
    c.data.on_error = "stop"  # at a bad row; or skip: leave out at most 1 % of the rows
    return c
