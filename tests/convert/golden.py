"""Weights from a seed by their published names, for golden files: both sides make the same ones, no file holds them."""

import hashlib
import zlib

import numpy as np

from jaxllm.convert import safetensors

TOKENS = np.random.default_rng(3).integers(1, 50, (2, 10))
PICKED = ((0, 9), (1, 4))  # (row, position) whose logits are kept


def weights(shapes):
    """{name: shape} -> {name: float32 array}: no bias 0, no scale 1."""

    def one(name, shape):
        noise = 0.3 * np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
        return (noise + (len(shape) == 1 and name.endswith("weight"))).astype(np.float32)

    return {name: one(name, tuple(shape)) for name, shape in sorted(shapes.items())}


def digest(shapes):
    """Of the names and shapes of all tensors."""
    return hashlib.sha256(repr(sorted((n, tuple(s)) for n, s in shapes.items())).encode()).hexdigest()


def write(directory, shapes):
    """model.safetensors of seeded weights."""
    arrays = weights(shapes)
    safetensors.write(directory / "model.safetensors", [(n, a.dtype, a.shape) for n, a in arrays.items()], arrays.values())


def pick(logits):
    """The kept logits [2, 50], rounded to what a file should hold, and the scale of all."""
    kept = [[float(f"{x:.6g}") for x in logits[row, position]] for row, position in PICKED]
    return {"logits": kept, "scale": float(np.abs(logits).max())}
