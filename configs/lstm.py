"""Recurrent language models. Variants: zaremba-medium, zaremba-large; elmo and tiny-elmo read in both directions."""

import dataclasses

import ml_collections

from configs.common import training
from jaxllm.core.types import UserError
from jaxllm.models.recurrent import PRESETS, BiLSTMConfig


def get_config(variant=None):
    name = variant or "tiny"
    if name not in PRESETS:
        raise UserError(f"unknown variant {name!r}: choose one of {', '.join(PRESETS)}")
    model, small = PRESETS[name], name.startswith("tiny")
    c = training(steps=600, batch_size=32, lr=4e-3, eval_every=200)
    c.optim.warmup = 20
    c.family = "elmo" if isinstance(model, BiLSTMConfig) else "lstm"
    c.data = ml_collections.ConfigDict()
    c.data.path = ""  # a file, a directory or hf:name; empty: the embedded text and the documents of the instr world
    c.data.column = "text"
    c.data.world_share = 0.65  # of the tokens, when path is empty
    c.data.characters = 2_400_000  # of embedded text at most, when path is empty
    c.data.length = 64 if small else model.max_length
    c.data.held_out = 0.02
    c.tokenizer = "bpe"  # trained on the data: bpe, unigram; or byte; or a path to a tokenizer
    c.vocab_size = model.vocab_size  # of a trained tokenizer
    fields = dataclasses.asdict(model)
    del fields["vocab_size"]  # the tokenizer's
    c.model = ml_collections.ConfigDict(fields)
    if not small:
        c.optim.lr, c.optim.warmup, c.steps, c.batch_size, c.log_every, c.eval_every = 1e-3, 500, 50_000, 128, 100, 5000
    return c
