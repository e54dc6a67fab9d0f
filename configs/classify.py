"""Classification on an encoder or another trunk. Variants (published encoder sizes): bert-base, bert-large, roberta-base, ..."""

import dataclasses

import ml_collections
from ml_collections import config_dict

from configs.common import model_settings, training
from jaxllm.core.types import UserError
from jaxllm.models.encoder import PRESETS


def get_config(variant=None):
    name = variant or "tiny"
    if name not in PRESETS:
        raise UserError(f"unknown variant {name!r}: choose one of {', '.join(PRESETS)}")
    model, small = PRESETS[name], name == "tiny"
    c = training(steps=200, batch_size=32, lr=1e-3)
    c.optim.warmup = 10
    c.optim.weight_decay = 0.01
    c.init = ""  # a run of mlm, pretrain or lstm, <dir>[@step], or a published directory; empty: fresh weights
    c.mode = "finetune"  # finetune; probe: only the head is trained; scratch: init's architecture with fresh weights
    c.pool = "mean"  # of the tokens' states: mean; first (through BERT's pooler where there is one); last, for causal trunks
    c.layer = config_dict.placeholder(int)  # read the states before this layer, not the last ones
    c.data = ml_collections.ConfigDict()
    c.data.path = ""  # labelled rows, of any shape of jaxllm/data/labelled.py; empty: a built-in task
    c.data.on_error = "stop"  # at a bad row; or skip: leave out at most 1 % of the rows
    c.data.eval_path = ""  # rows kept for judging; empty: held_out of path's
    c.data.held_out = 0.2
    c.data.task = "families"  # built in, about the instr world's questions: kinds (3 labels) or families (29)
    c.data.rows = 128  # of training, when path is empty
    c.data.eval_rows = 1000
    c.data.length = 64 if small else model.max_length
    c.tokenizer = "byte"  # without init: byte; bpe, unigram: trained on the rows; or a path to a tokenizer
    c.vocab_size = 512  # of a trained tokenizer
    c.model = model_settings(dataclasses.replace(model, mlm=False))  # without init
    if not small:  # arXiv 1810.04805, A.3
        c.optim.lr, c.steps, c.optim.warmup, c.pool = 3e-5, 3000, 300, "first"
    return c
