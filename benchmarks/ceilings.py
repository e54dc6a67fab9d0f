"""What the machine can do: the matrix products of the train step and nothing else, and the rate at which memory is copied."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.shape import Shape

Product = tuple[int, int, int, int]  # batch, m, k, n
COPIED = 2**28  # bytes


def products(shape: Shape) -> list[tuple[Product, int]]:
    """(batch, m, k, n) of every product of a forward pass, and how often; backward are two for each, of the same FLOPs.

    Attention's are the whole squares, as a plain softmax multiplies them.
    """
    tokens, d, n = shape.batch * shape.length, shape.width, shape.layers
    heads, k, length = shape.batch * shape.heads, shape.width // shape.heads, shape.length
    layer = [(1, tokens, d, 3 * d), (1, tokens, d, d), (1, tokens, d, 4 * d), (1, tokens, 4 * d, d)]
    attention = [(heads, length, k, length), (heads, length, length, k)]
    return [(p, n) for p in layer + attention] + [((1, tokens, d, shape.vocab), 1)]


def flops(shape: Shape) -> int:
    """Of all products of a train step."""
    return sum(3 * times * 2 * b * m * k * n for (b, m, k, n), times in products(shape))


def triples(shape: Shape) -> list[tuple[Product, int]]:
    """The forward product, the gradient of its left side, the gradient of its right side."""
    return [(q, times) for (b, m, k, n), times in products(shape) for q in ((b, m, k, n), (b, m, n, k), (b, k, m, n))]


def operands(product: Product) -> list[np.ndarray]:
    b, m, k, n = product
    rng = np.random.default_rng(0)
    return [rng.standard_normal(size, np.float32) for size in ((b, m, k), (b, k, n))]


def train_step(shape: Shape) -> tuple[dict, Callable[[int], None]]:
    """The products in JAX, as programs of one product each."""
    import jax
    import jax.numpy as jnp

    return _run(shape, jax.jit(jnp.matmul), jnp.asarray, jax.block_until_ready)


def train_step_torch(shape: Shape) -> tuple[dict, Callable[[int], None]]:
    """The products in PyTorch."""
    import torch

    return _run(shape, torch.matmul, torch.from_numpy, lambda x: x)


def _run(shape: Shape, matmul: Callable, convert: Callable, wait: Callable) -> tuple[dict, Callable[[int], None]]:
    work = [([_plain(convert(x)) for x in operands(q)], times) for q, times in triples(shape)]

    def run(steps: int) -> None:
        for _ in range(steps):
            for (a, b), times in work:
                for _ in range(times):
                    wait(matmul(a, b))

    run(1)
    return {"flops": flops(shape)}, run


def _plain(x: Any) -> Any:
    """A batch of one is a matrix."""
    return x[0] if x.shape[0] == 1 else x


def copies(shape: Shape, rounds: int) -> dict[str, list[float]]:
    """No row: the rates at which memory is copied, for information."""
    source = np.ones(COPIED // 4, np.float32)
    target = np.empty_like(source)
    rate = best(rounds, lambda: np.copyto(target, source))
    print(f"  memory is copied at {rate / 1e9:.1f} GB/s by numpy, {best_copy(rounds) / 1e9:.1f} GB/s by JAX", flush=True)
    return {}


def best_copy(rounds: int) -> float:
    """The rate of JAX's copies on its device."""
    import jax
    import jax.numpy as jnp

    source, copy = jnp.ones(COPIED // 4, jnp.float32), jax.jit(jnp.copy)
    return best(rounds, lambda: jax.block_until_ready(copy(source)))


def best(rounds: int, copy: Callable[[], Any]) -> float:
    """Bytes read and written per second, in the fastest of some rounds after one of warm-up."""
    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        copy()
        seconds.append(time.perf_counter() - began)
    return 2 * COPIED / min(seconds[1:])
