"""Learning-rate schedules, and the optimizers: AdamW, Adafactor and Muon, put together from optax's parts.

All three clip the global norm, decay the same leaves and take the learning rate as the size of a step, so that a config can
change one for another. A parameter that a scan stacks over layers is one parameter to Adafactor's clipping, and a batch of
matrices to Muon.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from jaxllm.core.tree import flatten, map_paths
from jaxllm.core.types import UserError


def warmup_cosine(lr: float, steps: int, *, warmup: int = 0, final: float = 0.1) -> optax.Schedule:
    """Linear warm-up to lr over `warmup` steps, then a cosine to final * lr at `steps` (arXiv 1608.03983)."""
    warmup = min(warmup, max(steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(
        lr if warmup == 0 else 0.0, lr, warmup_steps=warmup, decay_steps=max(steps, 1), end_value=final * lr
    )


def warmup_linear(lr: float, steps: int, *, warmup: int = 0, final: float = 0.0) -> optax.Schedule:
    """Linear warm-up to lr, then linear decay to final * lr at `steps`."""
    down = optax.linear_schedule(lr, final * lr, max(steps - warmup, 1))
    if warmup == 0:
        return down
    return optax.join_schedules([optax.linear_schedule(0.0, lr, warmup), down], [warmup])


def decayed(params: Any) -> Any:
    """Which leaves weight decay applies to: kernels and embeddings; not norms' scales, not biases."""
    return map_paths(lambda path, _: not path.endswith(("/scale", "/bias")), params)


def adamw(
    schedule: optax.Schedule | float, *, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8, weight_decay: float = 0.1,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:  # fmt: skip
    """Gradient clipping by global norm, then AdamW (arXiv 1711.05101) with the decay mask of `decayed`."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed),
    )


def adafactor(
    schedule: optax.Schedule | float, *, decay: float = 0.8, smallest: int = 128, weight_decay: float = 0.1,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:  # fmt: skip
    """Adafactor (arXiv 1804.04235) without momentum: second moments as a row and a column for each matrix.

    V_t = R_t C_t / mean(R_t) with beta2_t = 1 - t ** -decay, updates clipped to an RMS of 1 (sections 3, 6 and 7). The two
    largest dimensions are factored where both have at least `smallest` entries. Steps are not scaled by the
    parameters' own size (section 8): lr means what it means for AdamW, and so does the decay, which comes after it.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.scale_by_factored_rms(decay_rate=decay, min_dim_size_to_factor=smallest),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(weight_decay, decayed),
        optax.scale_by_learning_rate(schedule),
    )


# ---- Muon

# kernels of the hidden layers, as (path, dimensions that are read, dimensions that are written); what stands before is a batch
MATRICES = (
    (r"router/kernel$", 0, 0),  # it scores experts, each by a column of its own: that is a head
    (r"(layers|mtp)/(.*/)?(q|k|v|q_b|kv_b|input|recurrent)/kernel$", 1, 2),
    (r"(layers|mtp)/(.*/)?o/kernel$", 2, 1),
    (r"(layers|mtp)/.*/kernel$", 1, 1),
)


def matrix(path: str, ndim: int) -> contrib.MuonDimensionNumbers | None:
    """Which dimensions of a parameter make a hidden layer's matrix; None: it is none."""
    reads, writes = next(((r, w) for pattern, r, w in MATRICES if re.search(pattern, path)), (0, 0))
    if not reads or ndim < reads + writes:
        return None
    dims = range(ndim - reads - writes, ndim)
    return contrib.MuonDimensionNumbers(tuple(dims[:reads]), tuple(dims[reads:]))


def muon(
    schedule: optax.Schedule | float, *, momentum: float = 0.95, b1: float = 0.9, b2: float = 0.95, weight_decay: float = 0.1,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:  # fmt: skip
    """Muon for the matrices of hidden layers, AdamW for embeddings, heads, routers, norms and biases.

    O_t = NewtonSchulz5(momentum M_t + (1 - momentum) G_t), W_t+1 = W_t - lr (0.2 sqrt(max(in, out)) O_t + weight_decay W_t):
    Keller Jordan's, with the scale of arXiv 2502.16982 (eq. 4), at which AdamW's lr and weight_decay hold. Each layer's (and
    each expert's) matrix is orthogonalised by itself, queries, keys and values of all heads as one. UserError without matrices.
    """

    def dims(params: Any) -> Any:
        one = lambda path, x: matrix(jax.tree_util.keystr(path, simple=True, separator="/"), x.ndim)  # noqa: E731
        return jax.tree_util.tree_map_with_path(one, params)

    def labels(params: Any) -> Any:
        found = map_paths(lambda path, x: "rest" if matrix(path, x.ndim) is None else "matrix", params)
        if "matrix" not in flatten(found).values():
            raise UserError("optim.name='muon': none of the trained parameters is a hidden layer's matrix; use optim.name=adamw")
        return found

    matrices = optax.chain(
        contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=dims),
        optax.stateless(lambda updates, _: jax.tree.map(_as_adam, updates, dims(updates))),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(schedule),
    )
    rest = optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(clip_norm), optax.multi_transform({"matrix": matrices, "rest": rest}, labels))


def _as_adam(update: jax.Array, dims: contrib.MuonDimensionNumbers) -> jax.Array:
    """An orthogonal update at the RMS that AdamW's has in practice, about 0.2."""
    sides = [jnp.prod(jnp.array([update.shape[i] for i in side])) for side in dims]
    return update * (0.2 * jnp.sqrt(jnp.maximum(*sides).astype(update.dtype)))
