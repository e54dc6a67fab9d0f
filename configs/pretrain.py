"""Pretraining on next tokens. Variants are the model presets: configs/pretrain.py:gpt2, :llama3.2-1b, ..."""

import ml_collections

from configs.common import model_settings, training
from jaxllm.models.presets import preset


def get_config(variant=None):
    c = training(steps=600, batch_size=32, lr=3e-3, eval_every=200)
    c.optim.warmup = 20
    model = preset(variant or "tiny")
    c.data = ml_collections.ConfigDict()
    c.data.path = ""  # a file, a directory or hf:name; empty: the embedded text and the documents of the instr world
    c.data.column = "text"
    c.data.world_share = 0.65  # of the tokens, when path is empty
    c.data.characters = 2_400_000  # of embedded text at most, when path is empty
    c.data.length = 64 if variant is None else model.max_length
    c.data.held_out = 0.02
    c.tokenizer = "bpe"  # trained on the data: bpe, unigram; or byte; or a path to a tokenizer
    c.vocab_size = model.vocab_size  # of a trained tokenizer
    c.model = model_settings(model)
    if variant is not None:
        c.optim.lr, c.optim.warmup, c.steps, c.batch_size, c.log_every = 3e-4, 2000, 100_000, 256, 100
    return c
