"""What every training recipe has at its top."""

import dataclasses
from typing import Any

import ml_collections
from ml_collections import config_dict


def training(*, steps: int, batch_size: int, lr: float, log_every: int = 10, eval_every: int = 0) -> ml_collections.ConfigDict:
    """The settings that all stages share."""
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.steps = steps
    c.save_every = 0  # steps between checkpoints; 0: only save_seconds and the end
    c.save_seconds = 180.0
    c.keep = 2  # checkpoints kept
    c.log_every = log_every
    c.eval_every = eval_every  # steps between evaluations, in recipes that have some; 0: only at the end
    c.batch_size = batch_size
    c.accumulate = 1  # micro-batches per step
    c.spike_sigma = 6.0  # skip updates whose loss or gradient is so many standard deviations up; 0: only what is not finite
    c.watchdog = 120.0  # least seconds without a step that end a hung run, with stacks; 0: never
    c.gates = True  # stop a run whose first steps are not what they must be
    c.profile = ""  # steps to trace, such as 10:15, into <workdir>/profile
    c.teach_bug = ""  # a known bug to train with, for teaching: docs/doctor.md
    c.show_sharding = False  # print how each parameter lies on the mesh
    c.optim = ml_collections.ConfigDict(dict(lr=lr, warmup=0, final=0.1, b1=0.9, b2=0.95, weight_decay=0.1, clip_norm=1.0))
    c.optim.name = "adamw"  # adamw | adafactor | muon
    c.optim.moments = "float32"  # float32 | bfloat16: what moments are kept in between steps
    c.optim.offload = False  # keep moments in the host's memory
    c.mesh = ml_collections.ConfigDict(dict(data=1, fsdp=1, tensor=1, expert=1, context=1))
    c.rules = ""  # changes of the sharding rules, such as residual=context+tensor
    return c


def lora(c: Any, match: str = "attention/(q|k|v|o)/kernel|ffn/(gate|up|down)/kernel") -> None:
    """The settings of a stage that can train adapters (arXiv 2106.09685) instead of all weights."""
    c.lora = ml_collections.ConfigDict(dict(rank=0, alpha=16.0, match=match, scaling="standard"))  # rank 0: all weights


def text_data(c: Any, *, length: int, vocab_size: int, characters: int = 2_400_000) -> None:
    """The settings of a recipe that reads plain text and may train a tokenizer on it."""
    c.data = ml_collections.ConfigDict()
    c.data.path = ""  # a file, a directory or hf:name; empty: the embedded text and the documents of the instr world
    c.data.on_error = "stop"  # at a bad row; or skip: leave out at most 1 % of the rows
    c.data.column = "text"
    c.data.world_share = 0.65  # of the tokens, when path is empty
    c.data.characters = characters  # of embedded text at most, when path is empty
    c.data.length = length
    c.data.held_out = 0.02
    c.tokenizer = "bpe"  # trained on the data: bpe, unigram; or byte; or a path to a tokenizer
    c.vocab_size = vocab_size  # of a trained tokenizer


MAIN = (
    "max_length", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "positions", "norm", "activation", "bias",
    "tied", "rope_theta", "norm_eps", "attention", "dtype", "remat", "unroll",
)  # fmt: skip


def model_settings(model: Any) -> ml_collections.ConfigDict:
    """The fields of a model's config as settings: those that one turns, and those in which this model is unlike the default.

    `vocab_size` is not among them: it is the tokenizer's.
    """
    plain = dataclasses.asdict(model)
    usual = {f.name: f.default for f in dataclasses.fields(model)}
    shown = {n: v for n, v in plain.items() if n != "vocab_size" and (n in MAIN or v != usual[n])}
    return ml_collections.ConfigDict({n: config_dict.placeholder(int) if v is None else v for n, v in shown.items()})
