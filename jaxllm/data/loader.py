"""Batches as a function of (seed, step): a few bytes to save, and every host count reads the same order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np

from jaxllm.core.types import UserError


@dataclass(frozen=True)
class Loader:
    """size: rows of the data; batch(step): this process's rows, nested as the columns; state(step): JSON."""

    size: int
    batch: Callable[[int], dict[str, Any]]
    state: Callable[[int], dict[str, Any]]


def make_loader(
    columns: dict[str, Any], batch_size: int, seed: int, *, process_index: int = 0, process_count: int = 1
) -> Loader:
    """A Loader over nested columns [n, ...], reshuffled each epoch; every row once an epoch.

    Epochs follow one another without a gap, so a batch may end one and begin the next. Process p of P takes
    rows [p b / P, (p + 1) b / P) of the global batch of b. UserError: no rows, a batch that does not divide.
    """
    size = _size(columns)
    if seed < 0:
        raise UserError(f"config.seed={seed} must not be negative")
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"config.batch_size={batch_size} does not divide over {process_count} processes: "
            f"use a multiple of {process_count}"
        )
    share = batch_size // process_count
    order = lru_cache(maxsize=2)(lambda epoch: epoch_order(size, seed, epoch))
    digest = cache(lambda: fingerprint(columns))

    def batch(step: int) -> dict[str, Any]:
        start = step * batch_size + process_index * share
        epochs, places = np.divmod(np.arange(start, start + share), size)
        rows = np.concatenate([order(int(e))[places[epochs == e]] for e in np.unique(epochs)])
        return _take(columns, rows)

    return Loader(size, batch, lambda step: {"seed": seed, "step": int(step), "fingerprint": digest()})


def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [size]: the order of an epoch.

    The raw output of a generator is sorted, because numpy promises that stream for ever (`permutation` may
    change between versions, and a resumed run would silently read another order). Not grain's MapDataset: its
    random access costs 20 us a row (10 ms for 512), and epoch e of seed s is epoch e - 1 of seed s + 1 there.
    """
    raw = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(size)
    return np.argsort(raw, kind="stable")


def fingerprint(columns: dict[str, Any]) -> str:
    """16 hexadecimal digits over names, shapes and values.

    Of float columns only names and shapes count: they are computed (reference log-probabilities), differ in
    their last bits from mesh to mesh, and a run may continue on another mesh.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, x in _leaves(columns):
        kind = "float" if np.issubdtype(x.dtype, np.floating) else str(x.dtype)
        digest.update(f"{name} {kind} {x.shape};".encode())
        if kind != "float":
            digest.update(np.ascontiguousarray(x).data)
    return digest.hexdigest()


def check_state(loader: Loader, state: dict[str, Any], otherwise: str = "") -> None:
    """UserError when a checkpoint's data state belongs to other data or another seed; it ends with what else can be done."""
    now = loader.state(0)
    if state.get("fingerprint") != now["fingerprint"]:
        raise UserError(
            f"the data changed since the checkpoint: its fingerprint was {state.get('fingerprint')}, "
            f"now it is {now['fingerprint']}. Restore the old data or settings, or use another --workdir{otherwise}"
        )
    if state.get("seed") != now["seed"]:
        raise UserError(
            f"the checkpoint's data order has seed {state.get('seed')}, config.seed is {now['seed']}: "
            f"use the old seed, or another --workdir{otherwise}"
        )


def _leaves(columns: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for name in sorted(columns):
        value = columns[name]
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}/")
        else:
            yield prefix + name, np.asarray(value)


def _size(columns: dict[str, Any]) -> int:
    sizes = {name: len(x) for name, x in _leaves(columns)}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"columns of different numbers of rows: {sizes}")
    if not any(sizes.values()):
        raise UserError("the data has no rows")
    return next(iter(sizes.values()))


def _take(columns: dict[str, Any], rows: np.ndarray) -> dict[str, Any]:
    return {
        name: _take(x, rows) if isinstance(x, dict) else np.asarray(x)[rows] for name, x in columns.items()
    }
