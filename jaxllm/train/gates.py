"""Gates: what must hold when a run begins, checked on the run itself; where it does not, the run stops and says why.

A gate is a function of what was seen of a step, `Seen`: it gives a line when it has passed (an empty one says nothing), None
when this step cannot decide, and raises UserError when it fails. `guarded` puts gates around a train step; once all have passed,
the step runs as it did before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core.tree import flatten
from jaxllm.core.types import Batch, Key, Mean, Params, TrainState, UserError
from jaxllm.train.loop import fetch
from jaxllm.train.step import Step, settled

# activations' dtype -> how far equal numbers may be apart that two programs made
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
# the first logged metrics of a policy that starts at its reference
PAIRS = {"rewards/chosen": 0.0, "rewards/rejected": 0.0, "rewards/margins": 0.0}
UNPAIRED = {"rewards/chosen": 0.0, "rewards/rejected": 0.0, "kl": 0.0}
ONLINE = {"first/val/ratio": 1.0, "first/policy/approxkl_avg": 0.0, "objective/kl": 0.0, "first/kl": 0.0}
OFF = "--config.gates=False runs without gates"

Prints = dict[str, tuple[int, int]]  # path -> fingerprint


class Seen(NamedTuple):
    """One step: its number (from 1), metrics, learning rate, the activations' dtype, and fingerprints before and after it."""

    step: int
    metrics: Mapping[str, float]
    lr: float
    dtype: str
    trained: tuple[Prints, Prints]
    frozen: tuple[Prints, Prints]


Gate = Callable[[Seen], str | None]


# ---- the gates


def start(expected: Mapping[str, float] = ONLINE, tolerance: float | None = None) -> Gate:
    """At the first step the ratio is 1, KL and rewards are 0: the metrics of `expected` that the step has, within tolerance.

    tolerance: TOLERANCE of the activations' dtype unless given. A run that is resumed has left its start and is not asked.
    """

    def gate(seen: Seen) -> str | None:
        if seen.step != 1:
            return ""
        limit = TOLERANCE[seen.dtype] if tolerance is None else tolerance
        there = {name: value for name, value in expected.items() if name in seen.metrics}
        if not there:
            raise UserError(f"gate `start`: the first step has none of the metrics {', '.join(expected)}. {OFF}")
        off = [n for n, want in there.items() if not abs(seen.metrics[n] - want) <= limit]  # `not`: nan is off too
        if off:
            values = ", ".join(f"{n} = {seen.metrics[n]:.6g} (expected {there[n]:g})" for n in off)
            raise UserError(
                f"gate `start` failed at step 1: {values}, tolerance {limit:g}: the policy does not start where its reference or "
                "its sampler is. Likely: a reference from another checkpoint or with adapters left in, dropout, a temperature or "
                f"top-p that the trainer does not apply, columns of another model. {OFF}"
            )
        return f"start: {', '.join(f'{n} = {seen.metrics[n]:.2g}' for n in there)} (tolerance {limit:g})"

    return gate


def moved(patience: int | None = 8) -> Gate:
    """After the first step with a learning rate and a gradient, every trained root has moved and no frozen leaf has changed.

    patience: so many steps may have a gradient of exactly 0 (identical pairs, groups without variance); None: any number.
    """
    zeros = 0

    def gate(seen: Seen) -> str | None:
        nonlocal zeros
        if changed := differing(*seen.frozen):
            raise UserError(
                f"gate `moved` failed at step {seen.step}: {len(changed)} of {len(seen.frozen[0])} frozen leaves changed: "
                f"{_some(changed)}. Likely: a buffer that is donated and also frozen, or a write in place. {OFF}"
            )
        if seen.lr == 0 or not math.isfinite(seen.metrics.get("grad_norm", 0.0)):
            return None  # nothing was to move: the guard makes no update of a gradient that is not finite
        still = unmoved(seen)
        roots = {path.partition("/")[0] for path in seen.trained[0]}
        stuck = sorted(roots - {p.partition("/")[0] for p in differing(*seen.trained)})
        grad = seen.metrics.get("grad_norm", float("nan"))
        if grad == 0:  # what moved then, weight decay has moved
            zeros += 1
            if patience is None or zeros < patience:
                return None
        if stuck or grad == 0:
            raise UserError(
                f"gate `moved` failed at step {seen.step}: no leaf of {', '.join(stuck or roots)} was moved by a gradient "
                f"(still: {_some(still) or 'none'}), learning rate {seen.lr:g}, grad_norm {grad:g}. Likely: an optimizer that "
                "masks them, a stopped gradient, a loss that does not depend on them, or a learning rate below the weights' "
                f"precision. {OFF}"
            )
        n, total = len(seen.trained[0]) - len(still), len(seen.trained[0])
        said = (f", still: {_some(still)}" if still else "") + ("; no frozen leaf" if seen.frozen[0] else "")
        return f"moved: {n} of {total} trained leaves{said}"

    return gate


def sampler(sampled: Any, trained: Any, mask: Any, tolerance: float = 1e-3) -> str:
    """The sampler's log-probabilities [b, l] equal the trainer's where mask: the line that says so.

    Both under the distribution that was sampled from: temperature, top-k and top-p renormalised. tolerance: of the mean
    difference; one token may differ by 20 times that. UserError otherwise, or when nothing was sampled.
    """
    mask = np.asarray(mask)
    apart = np.abs(np.asarray(sampled, np.float64) - np.asarray(trained, np.float64))[mask]
    if not apart.size:
        raise UserError(f"gate `sampler`: the mask has no sampled token: nothing to compare. {OFF}")
    mean, worst = float(apart.mean()), float(apart.max())
    said = f"{mean:.2g} in the mean and {worst:.2g} at most (tolerance {tolerance:g} and {20 * tolerance:g})"
    if not (mean <= tolerance and worst <= 20 * tolerance):
        raise UserError(
            f"gate `sampler` failed: on {apart.size} tokens, log-probabilities of sampler and trainer differ by {said}. Likely: "
            f"another temperature or top-p in the loss, other weights, positions or masks that are off by one. {OFF}"
        )
    return f"sampler: on {apart.size} tokens, log-probabilities of sampler and trainer differ by {said}"


# ---- fingerprints


def fingerprint(tree: Any) -> dict[str, jax.Array]:
    """uint32 [2] for every leaf: the sum of its bits, and the sum weighted by odd numbers of the positions, modulo 2^32.

    A change of one number always changes it. Jit it; each leaf is read once, where it lies.
    """

    def one(x: jax.Array) -> jax.Array:
        bits = _bits(x)
        index = jnp.zeros(bits.shape, jnp.uint32)
        for axis, size in enumerate(bits.shape):
            index = index * np.uint32(size & 0xFFFFFFFF) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        weight = index * np.uint32(0x9E3779B2) + np.uint32(1)  # even times anything, plus 1: odd, so it can be inverted
        return jnp.stack([jnp.sum(bits, dtype=jnp.uint32), jnp.sum(bits * weight, dtype=jnp.uint32)])

    return {path: one(jnp.asarray(x)) for path, x in flatten(tree).items()}


def _bits(x: jax.Array) -> jax.Array:
    """The bits of any array as uint32; numbers of 8 bytes take two."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    kind = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)


def differing(before: Prints, after: Prints) -> list[str]:
    """The paths whose fingerprints differ."""
    return [path for path in before if before[path] != after.get(path)]


def unmoved(seen: Seen) -> list[str]:
    """The trained leaves that a step left as they were."""
    moving = set(differing(*seen.trained))
    return [path for path in seen.trained[0] if path not in moving]


def _some(paths: Sequence[str], most: int = 4) -> str:
    return ", ".join(paths[:most]) + (f" and {len(paths) - most} more" if len(paths) > most else "")


# ---- around a step


def guarded(
    step_fn: Step, gates: Sequence[Gate], *, lr: Callable[[int], float], dtype: str = "float32",
    passed: Callable[[str], None] = print,
) -> Step:  # fmt: skip
    """step_fn with gates: `passed(line)` for each one that has passed, UserError from one that fails.

    lr(i): the learning rate of step i, from 0. While a gate is open the host waits for every step; then nothing is added.
    """
    waiting = list(gates)
    printed = jax.jit(fingerprint)

    def prints(tree: Params) -> Prints:
        return {path: tuple(map(int, x)) for path, x in jax.device_get(printed(tree)).items()}

    def step(state: TrainState, frozen: Params, batch: Batch, rng: Key) -> tuple[TrainState, dict[str, Mean]]:
        if not waiting:
            return step_fn(state, frozen, batch, rng)
        number = int(state.step)
        before = prints(state.params), prints(frozen)
        state, metrics = settled(step_fn(state, frozen, batch, rng))
        after = prints(state.params), prints(frozen)
        seen = Seen(number + 1, fetch([metrics]), float(lr(number)), dtype, *zip(before, after, strict=True))
        lines = [gate(seen) for gate in waiting]
        waiting[:] = [gate for gate, line in zip(waiting, lines, strict=True) if line is None]
        for line in filter(None, lines):
            passed(line)
        return state, metrics

    return step
