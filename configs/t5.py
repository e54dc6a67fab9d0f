"""T5: span corruption, and text to text. Variants: multitask, a published size (t5-small), or both (t5-small-multitask)."""

import ml_collections

from configs.common import model_settings, training
from jaxllm.core.types import UserError
from jaxllm.models.encdec import PRESETS


def get_config(variant=None):
    multitask = (variant or "").endswith("multitask")
    name = (variant or "tiny").removesuffix("multitask").rstrip("-") or "tiny"
    if name not in PRESETS:
        raise UserError(f"no variant {variant!r}: multitask, or one of {', '.join(PRESETS)}, alone or with -multitask behind it")
    model = PRESETS[name]
    c = training(steps=800 if multitask else 500, batch_size=32, lr=2e-3, log_every=20, eval_every=250)
    c.optim.warmup = 50
    c.objective = "text2text" if multitask else "spans"  # spans, prefix (language modelling behind a prefix) or text2text
    c.init = ""  # a T5 run, <dir>[@step], to go on from; empty: from scratch
    c.data = ml_collections.ConfigDict()
    c.data.path = ""  # text; for text2text rows with input, target and perhaps task; empty: built-in data
    c.data.on_error = "stop"  # at a bad row; or skip: leave out at most 1 % of the rows
    c.data.length = 64 if name == "tiny" else model.max_length  # of inputs; span corruption fills it
    c.data.held_out = 0.02
    if multitask:
        c.data.target_length = c.data.length // 2
        c.data.tasks = ""  # names with commas between; empty: all
        c.data.limit = 12_000  # examples that a task counts for at most when tasks are mixed
        c.data.temperature = 1.0  # 1: in proportion to examples; large: all tasks alike
        c.data.test = 64  # examples a task that greedy answers are judged on
    else:
        c.data.column = "text"
        c.data.world_share = 0.65  # of the tokens, when path is empty
        c.data.characters = 2_400_000  # of embedded text at most, when path is empty
        c.data.density, c.data.mean_span = 0.15, 3.0
        c.data.copies = 1  # times that the text is corrupted, each with other noise: as many as it is read
    c.tokenizer = "bpe"  # trained on the data: bpe, unigram; or byte; or a path to a tokenizer; of the run of init, when given
    c.vocab_size = model.vocab_size if name == "tiny" else 32_000  # of a trained tokenizer, without sentinels
    c.model = model_settings(model)
    if name != "tiny":
        c.optim.lr, c.optim.warmup, c.steps, c.batch_size, c.log_every = 1e-3, 2000, 100_000, 128, 100
    return c
