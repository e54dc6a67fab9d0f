"""What every contender is given: the sizes, the same weights and the same tokens, as numpy arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEARNING_RATE, B1, B2, EPS, WEIGHT_DECAY, CLIP_NORM = 1e-3, 0.9, 0.95, 1e-8, 0.1, 1.0
BETA = 0.1  # of DPO
CHECKED_STEPS = 6  # the loss of the sixth is the loss after five updates


@dataclass(frozen=True)
class Shape:
    """A GPT-2 of small size, the training batch, and the decoding task."""

    layers: int = 4
    width: int = 256
    heads: int = 8
    vocab: int = 4096
    length: int = 256
    batch: int = 8
    steps: int = 2  # train steps per measurement
    rows: int = 8  # decoding: prompts at once
    prompt: int = 64
    new_tokens: int = 128
    pairs: int = 8  # DPO: pairs of a step
    prompts: int = 2  # GRPO: prompts of an iteration,
    group: int = 8  # completions of each
    completion: int = 64  # alignment: tokens of a completion, after a prompt of `prompt` tokens


def weights(shape: Shape, seed: int = 0) -> dict[str, np.ndarray]:
    """GPT-2's parameters by name, kernels [in, out]; the layers' are stacked on a leading axis [n, ...]."""
    rng = np.random.default_rng(seed)
    n, d, f = shape.layers, shape.width, 4 * shape.width

    def kernel(*size: int) -> np.ndarray:
        return (0.02 * rng.standard_normal(size)).astype(np.float32)

    sizes = {"qkv": (d, 3 * d), "out": (d, d), "up": (d, f), "down": (f, d)}
    w = {"wte": kernel(shape.vocab, d), "wpe": kernel(shape.length, d)}
    for name, (fan_in, fan_out) in sizes.items():
        w[f"{name}_kernel"] = kernel(n, fan_in, fan_out)
        w[f"{name}_bias"] = np.zeros((n, fan_out), np.float32)
    for name, size in (("norm1", (n, d)), ("norm2", (n, d)), ("norm", (d,))):
        w[f"{name}_scale"] = np.ones(size, np.float32)
        w[f"{name}_bias"] = np.zeros(size, np.float32)
    return w


def count(arrays: dict[str, np.ndarray]) -> int:
    """The number of parameters."""
    return sum(x.size for x in arrays.values())


def batch(shape: Shape, step: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens and targets [b, l] of a step; small ids are more frequent: there is something to learn."""
    rng = np.random.default_rng([1, step])
    tokens = (shape.vocab * rng.random((shape.batch, shape.length + 1)) ** 3).astype(np.int32)
    return tokens[:, :-1], tokens[:, 1:]


def prompts(shape: Shape) -> np.ndarray:
    """Random prompts [rows, prompt]."""
    return np.random.default_rng(2).integers(0, shape.vocab, (shape.rows, shape.prompt), dtype=np.int32)


def pairs(shape: Shape, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompts, chosen and rejected completions of a DPO step, int [pairs, ...]; chosen tokens are smaller ids."""
    rng = np.random.default_rng([3, step])
    draw = lambda length, power: (shape.vocab * rng.random((shape.pairs, length)) ** power).astype(np.int32)  # noqa: E731
    return draw(shape.prompt, 2), draw(shape.completion, 3), draw(shape.completion, 1.5)


def reward(completion: list[int]) -> float:
    """The share of even ids: a verifier in plain Python."""
    return sum(i % 2 == 0 for i in completion) / len(completion)
