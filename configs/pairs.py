"""Preference collection: two completions a prompt from a fine-tuned model, judged by the simulated annotator."""

import ml_collections


def get_config(variant=None):
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.init = ""  # an SFT run, <dir>[@step]; empty: train one first
    c.prompts = 3072
    c.held_out = 1024  # prompts whose pairs are kept for judging reward models
    c.batch_size = 256
    c.max_prompt = 32
    c.max_new_tokens = 36
    c.temperature = 1.0
    return c
