"""Memory and time of the loss at a vocabulary of 128k: `ops.cross_entropy` against log-softmax over all logits."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.shape import Shape
from jaxllm.core import ops
from jaxllm.core.types import Head

WIDTH, VOCAB, TOKENS = 256, 128_256, 4096  # Llama 3's vocabulary; tokens of the compiled program whose memory is read
TIMED = 1024  # tokens of the one that runs


def chunked(kernel: jax.Array, hidden: jax.Array, targets: jax.Array) -> jax.Array:
    """The library's loss, as `losses.lm` calls it."""
    total, _ = ops.cross_entropy(Head(kernel), hidden, targets, jnp.ones(targets.shape, bool))
    return total / targets.size


def naive(kernel: jax.Array, hidden: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean of -log softmax at the targets."""
    logps = jax.nn.log_softmax(hidden @ kernel)
    return -jnp.take_along_axis(logps, targets[..., None], axis=-1).mean()


def compiled(loss: Any, arguments: tuple) -> Any:
    """value_and_grad of a loss with respect to kernel and hidden, compiled for arguments or their shapes."""
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments).compile()


def arguments_of(tokens: int, width: int, vocab: int) -> tuple:
    """A kernel, hidden states and targets of rows of at most 256 tokens."""
    keys, length = jax.random.split(jax.random.key(0), 3), min(tokens, 256)
    rows = tokens // length
    kernel = 0.02 * jax.random.normal(keys[0], (width, vocab))
    return kernel, jax.random.normal(keys[1], (rows, length, width)), jax.random.randint(keys[2], (rows, length), 0, vocab)


def loss(shape: Shape, rounds: int) -> dict[str, list[float]]:
    """Temporary bytes of the compiled loss with its gradients, and seconds, each over those of the naive one."""
    shapes = jax.eval_shape(lambda: arguments_of(TOKENS, WIDTH, VOCAB))
    memory = [compiled(fn, shapes).memory_analysis().temp_size_in_bytes for fn in (chunked, naive)]
    print(f"  {memory[0] / 1e6:,.0f} and {memory[1] / 1e6:,.0f} MB at {TOKENS} tokens x {WIDTH} x {VOCAB}", flush=True)
    arguments = jax.jit(lambda: arguments_of(TIMED, WIDTH, VOCAB))()
    programs = [compiled(fn, arguments) for fn in (chunked, naive)]
    values = [float(program(*arguments)[0]) for program in programs]
    assert abs(values[0] - values[1]) < 1e-3, f"loss_memory: losses {values}"
    return {"loss_memory/naive": [memory[0] / memory[1]] * 2, "loss_step/naive": ratios(programs, arguments, rounds)}


def ratios(programs: list, arguments: tuple, rounds: int) -> list[float]:
    """Seconds of the first program over those of the second, in turns."""
    rows = []
    for _ in range(rounds + 1):
        seconds = []
        for program in programs:
            began = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            seconds.append(time.perf_counter() - began)
        rows.append(seconds[0] / seconds[1])
    return rows[1:]
