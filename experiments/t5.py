"""Train an encoder-decoder: span corruption of plain text, then many tasks as text to text.

python -m experiments.t5                                                    # CPU size, embedded text, about a minute
python -m experiments.t5 --config=configs/t5.py:multitask --config.init=runs/t5-...      # from it; without init: from scratch
python -m experiments.t5 --config=configs/t5.py:t5-small --config.data.path=corpus.jsonl

Text to text ends with the exact match of greedy answers by task, beside the two answers that need no model: the task's most
frequent target, and its input. At the default size seed 0 gave a mean of 0.75 from scratch (0.03 for sums, 0.61 for
questions, 0.84 to 1.00 for the others), and 0.42 from 500 steps of span corruption; seeds 1 and 2 likewise: so short a start does
not help.
"""

from __future__ import annotations

import dataclasses

from experiments import common, pretrain, speed, text2text
from jaxllm import launch
from jaxllm.core.types import UserError
from jaxllm.data import denoise
from jaxllm.models import encdec


def begin(config, run, texts, mesh):
    """(tokenizer with sentinels, model, params): of the run of config.init, or new ones."""
    if config.init:
        base = launch.load(config.init, default="t5", mesh=mesh)
        if not isinstance(base.model.config, encdec.EncDecConfig):
            raise UserError(f"config.init={config.init}: not an encoder-decoder: give a run of experiments.t5")
        return denoise.with_sentinels(base.tokenizer), base.model, base.params["policy"]
    tokenizer = denoise.with_sentinels(pretrain.tokenizer_of(config, texts))
    record = common.model_config(config, encdec.EncDecConfig, tokenizer.vocab_size)
    model = encdec.make(dataclasses.replace(record, start_id=tokenizer.specials["pad"]))
    return tokenizer, model, common.born_sharded(model.specs, config.seed, mesh)


def corrupted(config, run, tokenizer, documents, what, copies=1):
    """The record of a corpus: spans corrupted, or cut into prefixes and the rest."""
    c = config.data
    if config.objective == "prefix":
        pairs = denoise.prefix_lm(denoise.stream(tokenizer, documents, c.length), tokenizer, config.seed)
        return text2text.packed(config, run, tokenizer, pairs, c.length + 1, what)
    raw = denoise.raw_length(c.length, c.density, c.mean_span)
    rows = denoise.stream(tokenizer, documents, raw)
    if not len(rows):
        raise UserError(
            f"{c.path or 'text'}, {what}: fewer than the {raw} tokens of one row: give more text, or lower data.length"
        )
    record = denoise.spans(rows, tokenizer, config.seed, copies=copies, density=c.density, mean_span=c.mean_span)
    targets = record["targets"].shape[1]
    run.note(f"{what}: {len(rows):,} rows of {raw} tokens as {c.length} inputs and {targets} targets, noise drawn {copies} times")
    return record


def text_rows(config, run):
    """(texts to train a tokenizer on, a function of it to the records of training and evaluation): plain text."""
    train, held_out = pretrain.corpus(config, run)
    return train, lambda tokenizer: (
        corrupted(config, run, tokenizer, train, "train", config.data.copies),
        corrupted(config, run, tokenizer, held_out or train[:1], "held out"),
    )


def task_rows(config, run, tasks):
    """The same for tasks."""
    train, test = text2text.mixed(config, run, tasks), [pair for _, pairs in tasks.values() for pair in pairs]

    def rows(tokenizer):
        for pairs, what in ((train, "train"), (test, "test")):
            encoded = [denoise.encode_pair(tokenizer, *pair) for pair in pairs]
            yield text2text.packed(config, run, tokenizer, encoded, config.data.target_length, what)

    return [text for pair in train for text in pair], rows


def main(config, run):
    if config.objective not in ("spans", "prefix", "text2text"):
        raise UserError(f"config.objective={config.objective!r}: choose spans, prefix or text2text")
    # what cannot work is said before the text is read
    encdec.validate(common.model_config(config, encdec.EncDecConfig, config.vocab_size))
    common.check_batch(config, config.batch_size)
    tasks = text2text.tasks_of(config, run) if config.objective == "text2text" else None
    texts, rows_with = text_rows(config, run) if tasks is None else task_rows(config, run, tasks)
    with common.open_mesh(config) as mesh:
        tokenizer, model, params = begin(config, run, texts, mesh)
        run.note(f"model: {encdec.published_count(model.config):,} parameters, vocabulary of {model.config.vocab_size:,}")
        rows, eval_rows = rows_with(tokenizer)
        final = common.fit_lm(
            config, run, mesh=mesh, model=model, params=params, tokenizer=tokenizer, rows=rows, eval_rows=eval_rows
        )
        if tasks is not None:
            scores = text2text.exact_matches(config, run, launch.load(run.workdir, mesh=mesh), tasks, mesh)
            if not scores.keys() <= speed.logged(run, config.steps).keys():  # unless a try before this one came so far
                run.log(config.steps, scores)
            final = {**final, **scores}
    then = f"t5 --config=configs/t5.py:multitask --config.init={run.workdir}" if tasks is None else ""
    run.finish(final, [], then=then)


if __name__ == "__main__":
    launch.run(main, "t5")
