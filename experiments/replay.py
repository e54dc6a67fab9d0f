"""Repeat a step that was not finite, on the batch that was kept, and name the first tensor that is not finite.

    python -m experiments.replay --batch=runs/x/bad_batches/3417

The run's own experiment makes the step again, with the weights of its newest checkpoint, which no such step has touched.
"""

from __future__ import annotations

import contextvars
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jaxllm import launch
from jaxllm.core import tree
from jaxllm.core.types import UserError
from jaxllm.report import run as runs
from jaxllm.report.files import dump, read_json, write_atomic
from jaxllm.train import guard
from jaxllm.train.loop import fetch

BATCH, ABOUT = "batch.npz", "step.json"


class Repeated(Exception):
    """The step was made: what was found. It ends the experiment there."""


def keep(run: Any, config: Any, error: guard.NonFinite, loader: Any) -> str:
    """Write what `replay` needs of the first of the steps to <workdir>/bad_batches/<step>; what to do, in words."""
    where = run.path("bad_batches", str(error.first + 1), BATCH).parent
    if run.writes:
        np.savez(where / BATCH, **tree.flatten(loader.batch(error.first)))
        key = jax.random.key_data(jax.random.fold_in(jax.random.key(config.seed), error.first))
        about = {"step": error.first, "updates": error.updates, "key": key, "experiment": run.experiment, "config": run.config}
        write_atomic(where / ABOUT, dump({**about, "command": run.command}))
    return (
        f"The batch is kept; name the first tensor that is not finite with:  python -m experiments.replay --batch={where}  "
        f"Usual cures: a lower config.optim.lr (now {config.optim.lr:g}), a lower config.optim.clip_norm "
        f"(now {config.optim.clip_norm:g}), rows that are not what they should be"
    )


def repeat(about: dict, kept: dict) -> Any:
    """A stand-in for `loop.fit` that makes the one step and raises Repeated with its findings."""
    told: list[tuple] = []
    guard.listener.set(lambda *seen: told.append(seen))

    def loop(step_fn: Any, state: Any, frozen: Any, batches: Any, rng: Any, **_: Any) -> Any:
        batch = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), kept, batches(about["step"]))
        lines = [f"weights of the checkpoint of step {int(state.step)}"]
        lines += [*_bad("trained", state.params), *_bad("frozen", frozen), *_bad("batch", batch)]
        step = jax.device_put(jnp.int32(about["step"]), state.step.sharding)
        _, metrics = step_fn(state.replace(step=step), frozen, batch, rng)
        values = fetch([metrics])
        jax.effects_barrier()
        raise Repeated([*lines, *_updates(told), *(f"metric {n} is {v}" for n, v in values.items() if not np.isfinite(v))])

    return loop


def _bad(what: str, params: Any) -> Iterator[str]:
    for path, x in tree.flatten(params).items():
        if jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating) and (n := int((~jnp.isfinite(x)).sum())):
            yield f"{what} {path} has {n} of {x.size} numbers that are not finite"


def _updates(told: list[tuple]) -> Iterator[str]:
    """What was heard of each update: its loss, and the gradients that are not finite, the first one named."""
    for number, (loss, norm, finite) in enumerate(told, 1):
        which = f"update {number}: " if len(told) > 1 else ""
        if not np.isfinite(loss):
            yield f"{which}the loss is {float(loss)}: the forward pass is not finite"
        if bad := [path for path, fine in finite.items() if not fine]:
            yield f"{which}the gradient of {bad[0]} is not finite ({len(bad)} of {len(finite)} gradients)"
        elif not np.isfinite(norm):
            yield f"{which}every gradient is finite, but their norm is {float(norm)}: they are too large"


def main(batch: str) -> None:
    from experiments import common

    where = Path(batch)
    if not (where / ABOUT).is_file() or not (where / BATCH).is_file():
        raise UserError(f"--batch={batch}: give a directory under <run>/bad_batches, with {BATCH} and {ABOUT}")
    about = read_json(where / ABOUT)
    with np.load(where / BATCH, allow_pickle=False) as columns:
        kept = tree.unflatten(dict(columns))
    with runs.lock(where.absolute().parents[1]):  # a run that goes on there has saves that must not be taken for leftovers
        contextvars.copy_context().run(_again, common.LOOP, where, about, kept)


def _again(loop: contextvars.ContextVar, where: Path, about: dict, kept: dict) -> None:
    """The run's experiment up to its loop, with ours in place of it; nothing is written."""
    config = ml_collections.ConfigDict({**about["config"], "gates": False, "watchdog": 0.0})
    run = runs.Run(where.absolute().parents[1], about["experiment"], about["config"], about["command"], writes=False)
    loop.set(repeat(about, kept))
    try:
        importlib.import_module(f"experiments.{about['experiment']}").main(config, run)
    except Repeated as found:
        first, *lines = found.args[0]
        print(f"step {about['step'] + 1} again, with the {first}")
        print("\n".join(f"  {line}" for line in lines) or "  all is finite: it was not the batch alone")


if __name__ == "__main__":
    launch.tool(main, "replay", {"batch": ""})
