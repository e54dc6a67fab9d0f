"""How checks compare: gradients and losses as numbers, rows padded, unpacked and cut."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PAD = 8  # slots that padding adds
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}  # relative, between two programs that should agree
# of gradients, whose sums over a batch are in float32 in any case: healthy ones were up to 1e-6, 1.2e-2 apart, sick ones 7e-2
GRADIENTS = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}


def tolerance(config: Any, of: dict[str, float] = TOLERANCE) -> float:
    dtype = getattr(config, "dtype", "float32") or config.trunk.get("dtype", "float32")  # a head on a trunk has the trunk's
    return of[dtype]


def exact() -> Any:
    """A block in which products of float32 are not rounded to TF32 or bfloat16, as accelerators do; a CPU never does."""
    on_cpu = jax.default_backend() == "cpu"
    return contextlib.nullcontext() if on_cpu else jax.default_matmul_precision("highest")


def apart(a: Any, b: Any) -> float:
    """The norm of the difference of two trees over the norm of the first; nan where either has one, or nothing is compared."""
    size = lambda xs: np.sqrt(sum(float(jnp.sum(jnp.square(x.astype(jnp.float32)))) for x in xs))  # noqa: E731
    left, right = ([jnp.asarray(np.asarray(x, np.float32)) for x in jax.tree.leaves(t)] for t in (a, b))
    if not sum(x.size for x in left):
        return float("nan")
    return size([x - y for x, y in zip(left, right, strict=True)]) / max(size(left), 1e-30)


def padded(batch: Any, n: int = PAD, left: bool = False) -> Any:
    """Every record of a batch with n empty slots more; left: in front of the row."""
    if not isinstance(batch, dict):
        return batch
    batch = {name: padded(x, n, left) for name, x in batch.items()}
    if "tokens" not in batch:
        return batch
    shape = batch["tokens"].shape
    wide = lambda x: hasattr(x, "shape") and x.shape == shape  # noqa: E731
    slots = (n, 0) if left else (0, n)
    return {k: jnp.pad(x, [(0, 0)] * (len(shape) - 1) + [slots]) if wide(x) else x for k, x in batch.items()}


def several(columns: Any, most: int = 8) -> Any:
    """Rows that hold several examples; None where there are none, or where rows are more than one record."""
    if "segments" not in columns or np.ndim(columns["segments"]) != 2 or "inputs" in columns:
        return None
    found = np.flatnonzero(np.asarray(columns["segments"]).max(axis=1) > 1)[:most]
    return jax.tree.map(lambda x: np.asarray(x)[found], columns) if len(found) else None


def unpacked(record: dict[str, np.ndarray], most: int = 64) -> dict[str, np.ndarray]:
    """Rows of a packed record with each segment in a row of its own, at most so many."""
    shape = record["tokens"].shape
    columns = {n: np.asarray(x) for n, x in record.items() if np.shape(x) == shape}
    rows = [(i, s) for i in range(shape[0]) for s in np.unique(columns["segments"][i]) if s][:most]
    out = {n: np.zeros((len(rows), shape[1]), x.dtype) for n, x in columns.items()}
    for row, (i, s) in enumerate(rows):
        at = columns["segments"][i] == s
        for n, x in columns.items():
            out[n][row, : at.sum()] = 1 if n == "segments" else x[i][at]
    return out


def ragged(batch: Any, seed: int = 0) -> Any:
    """The batch with masks of very unlike sizes: row i keeps about i / rows of its trained places. At least one place stays."""
    if not isinstance(batch, dict):
        return batch
    batch = {name: ragged(x, seed) for name, x in batch.items()}
    for name in ("mask", "eligible"):
        if name in batch and jnp.ndim(batch[name]) > 1:
            rows = batch[name].shape[0]
            share = (jnp.arange(rows) + 1) / rows
            draw = jax.random.uniform(jax.random.key(seed), batch[name].shape)
            batch[name] = batch[name] & (draw < share.reshape(-1, *[1] * (draw.ndim - 1)))
    return batch


def nudged(tree: Any, size: float, seed: int = 0) -> Any:
    """Every leaf moved at random by `size` of its own root mean square (of 0.02 where that is less)."""
    leaves, kind = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def one(x: jax.Array, key: jax.Array) -> jax.Array:
        scale = size * jnp.maximum(jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)))), 0.02)
        return (x + scale * jax.random.normal(key, x.shape)).astype(x.dtype)

    return kind.unflatten([one(x, key) for x, key in zip(leaves, keys, strict=True)])
