"""Fine-tune or probe a trunk for classification of texts, pairs, words, spans or choices, and compare it with trivial baselines.

python -m experiments.classify --config.init=runs/mlm                               # 128 labelled questions, half a minute
python -m experiments.classify --config.init=runs/mlm --config.mode=scratch         # the same without what was learned
python -m experiments.classify --config.init=runs/mlm --config.mode=probe --config.layer=1
python -m experiments.classify --config.init=bert-base-uncased/ --config.data.path=rows.jsonl --config.pool=first
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import jax
import numpy as np

from experiments import common, memory, pretrain, reading
from jaxllm import launch
from jaxllm.convert import hf
from jaxllm.core import sharding
from jaxllm.core.types import UserError
from jaxllm.data import labelled, masking
from jaxllm.data import tokenizer as tokenizers
from jaxllm.data.text import placed
from jaxllm.losses import classify
from jaxllm.models import encoder, pooled
from jaxllm.train.annotate import map_batches
from jaxllm.train.step import trained_roots
from jaxllm.worlds import instr

# ---- rows


def of_questions(column):
    """Questions of the instr world, labelled with a column of theirs; held-out ones share no combination of arguments."""

    def rows(split, n, seed):
        return [{"text": t["prompt"], "label": t[column]} for t in instr.tasks(split, n, seed=seed)]

    def task(n, held_out, seed):
        train = rows("train", n, seed)
        known = {row["label"] for row in train}
        return train, [row for row in rows("test", held_out, seed) if row["label"] in known]

    return task


TASKS = {"kinds": of_questions("kind"), "families": of_questions("family")}


def labelled_rows(config, run):
    """((training rows, where each stands), (held-out rows, where each stands), where all of them come from)."""
    c, where = config.data, config.data.path or f"the task {config.data.task}"
    if c.path:
        read = partial(reading.checked, config, run, check=placed(labelled.check_row))
        rows, kept = (read(path) if path else [] for path in (c.path, c.eval_path))
        rows, kept = (rows, kept) if kept else common.hold_out(rows, c.held_out, config.seed)
    elif c.task not in TASKS:
        raise UserError(f"config.data.task={c.task!r}: choose one of {', '.join(TASKS)}")
    else:
        rows, kept = ([(where, row) for row in side] for side in TASKS[c.task](c.rows, c.eval_rows, config.seed))
    return *(([row for _, row in side], [place for place, _ in side]) for side in (rows, kept)), where


# ---- the trunk and its head


def trunk_of(config, rows, mesh):
    """(trunk without any head, its parameters or None, tokenizer)."""
    if not config.init:
        texts = [str(value) for row in rows for value in row.values()]
        tokenizer = masking.extended(pretrain.tokenizer_of(config, texts))
        return encoder.make(common.model_config(config, encoder.EncoderConfig, tokenizer.vocab_size)), None, tokenizer
    if (Path(config.init) / "config.json").is_file() and list(Path(config.init).glob("*.safetensors")):
        model, params = hf.load(config.init, mesh=mesh)
        tokenizer = tokenizers.load(config.init)
    else:
        base = launch.load(config.init, default="mlm", mesh=mesh)
        model, params, tokenizer = base.model, base.params[base.meta["roots"][0]], base.tokenizer
    if isinstance(model.config, pooled.PooledConfig):
        model = pooled.trunk_of(model.config)
        params = {name: leaves for name, leaves in params.items() if name != "classifier"}  # another head's scores
    if isinstance(model.config, encoder.EncoderConfig):
        model = encoder.make(dataclasses.replace(model.config, mlm=False, tied=True))
    full = masking.extended(tokenizer)
    return model, params, full if full.vocab_size <= model.config.vocab_size else tokenizer


# mode -> (the parameters to begin with, which of them are trained)
MODES = {
    "finetune": lambda fresh, trained: (pooled.graft(fresh, trained or {}), ".*"),
    "probe": lambda fresh, trained: (pooled.graft(fresh, trained or {}), "^classifier/classifier/"),
    "scratch": lambda fresh, trained: (fresh, ".*"),
}


# ---- training and judging


def fit(config, run, mesh, model, params, trainable, tokenizer, columns, kept, kind):
    """Trains; ({loss, accuracy, macro F1 over all held-out rows}, bool [m]: whether each label was right)."""
    common.check_length(model, config.data.length, "config.data.length")
    common.check_batch(config, len(columns["tokens"]))
    tx, schedule = common.optimizer(config)
    scores = partial(pooled.scores, model)
    loss_fn = classify.loss(scores, kind)
    step = memory.Step(model, "classifier", trainable, loss_fn, columns, params={"classifier": params})
    state, frozen, step_fn = memory.begin(config, step, loss_fn, tx, mesh)
    judge = jax.jit(lambda params, batch: kind(scores(params["classifier"], batch), batch))
    found, right = {}, []

    def measure(params):
        parts = map_batches(lambda p, batch: judge(p, sharding.put_batch(batch, mesh)), params, kept, config.batch_size)
        predicted, labels = parts.predicted[parts.weights], parts.labels[parts.weights]
        right[:] = (predicted == labels).tolist()
        found["eval/loss"] = float(parts.losses[parts.weights].mean())
        found["eval/accuracy"] = float(np.mean(right))
        _, ids = np.unique(np.stack([predicted, labels]), return_inverse=True)
        found["eval/macro_f1"] = float(classify.macro_f1(*ids.reshape(2, -1), int(ids.max()) + 1))

    def evaluate(step, params):
        measure(params)
        run.log(step, found)

    state = common.fit(
        config, run, mesh=mesh, columns=columns, tokenizer=tokenizer, model=model, state=state, frozen=frozen,
        step_fn=step_fn, schedule=schedule, evaluate=evaluate, tokens_per_step=config.batch_size * config.data.length,
    )  # fmt: skip
    if not found:  # resumed behind the last step
        measure(trained_roots(state.params, frozen))
    return found, np.array(right)


def main(config, run):
    if config.mode not in MODES:
        raise UserError(f"config.mode={config.mode!r}: choose one of {', '.join(MODES)}")
    (rows, places), (kept_rows, kept_places), where = labelled_rows(config, run)
    common.check_batch(config, len(rows))
    with common.open_mesh(config) as mesh:
        trunk, trained, tokenizer = trunk_of(config, rows, mesh)
        shape, train = labelled.encode(tokenizer, rows, places, config.data.length)
        _, kept = labelled.encode(tokenizer, kept_rows, kept_places, config.data.length, train.names)
        cut = f"{train.truncated} cut, {train.dropped} left out"
        reading.keep_report(run, where, {"examples": len(rows), "truncated": train.truncated, "dropped": train.dropped})
        run.note(f"{shape} rows of {where}: {len(rows):,} to train on ({cut}), {len(kept_rows):,} held out, {train.names[:8]}")
        if getattr(trunk.config, "n_types", 1) < 2:
            train.columns.pop("types"), kept.columns.pop("types")
        model = pooled.with_head(trunk, shape, len(train.names), config.pool, config.layer)
        fresh = common.born_sharded(model.specs, config.seed, mesh)
        params, trainable = MODES[config.mode](fresh, trained)
        found, right = fit(
            config, run, mesh, model, params, trainable, tokenizer, train.columns, kept.columns, classify.KINDS[shape]
        )
    simple = labelled.baselines(shape, train, kept)
    low, high = labelled.interval(right, seed=config.seed)
    others = ", ".join(f"{name} {value:.1%}" for name, value in simple.items())
    run.note(f"accuracy {found['eval/accuracy']:.1%} (95 % of bootstrap samples: {low:.1%} to {high:.1%}); {others}")
    bounds = {"eval/accuracy_low": low, "eval/accuracy_high": high}
    run.finish({**found, **bounds, **{f"baseline/{name}": value for name, value in simple.items()}}, [])


if __name__ == "__main__":
    launch.run(main, "classify")
