"""Feed-forward blocks."""

from __future__ import annotations

from typing import Any

import jax

from jaxllm.core.sharding import shard
from jaxllm.core.spec import Spec, SpecTree
from jaxllm.models.layers import ACTIVATIONS, dense, normal, zeros

# kind -> (activation, gated). Gated: arXiv 2002.05202.
KINDS: dict[str, tuple[str, bool]] = {
    "gelu": ("gelu", False),
    "gelu_exact": ("gelu_exact", False),
    "relu": ("relu", False),
    "quick_gelu": ("quick_gelu", False),
    "swiglu": ("silu", True),
    "geglu": ("gelu", True),
}


def specs(kind: str, d: int, f: int, bias: bool, residual_scale: float) -> SpecTree:
    """up and down, and for a gated kind gate."""
    names = ("gate", "up") if KINDS[kind][1] else ("up",)
    tree = {n: {"kernel": Spec((d, f), ("embed", "mlp"), normal(d))} for n in names}
    tree["down"] = {"kernel": Spec((f, d), ("mlp", "embed"), normal(f, residual_scale))}
    if bias:
        for name in names:
            tree[name]["bias"] = Spec((f,), ("mlp",), zeros)
        tree["down"]["bias"] = Spec((d,), ("embed",), zeros)
    return tree


def apply(params: Any, x: jax.Array, kind: str) -> jax.Array:
    """down(act(up(x))), or with a gate down(act(gate(x)) * up(x)): x [b, l, d] -> [b, l, d]."""
    act, gated = ACTIVATIONS[KINDS[kind][0]], KINDS[kind][1]
    up = dense(x, "bld,df->blf", params["up"]["kernel"], params["up"].get("bias"))
    gate = dense(x, "bld,df->blf", params["gate"]["kernel"], params["gate"].get("bias")) if gated else up
    hidden = act(gate) * up if gated else act(up)
    hidden = shard(hidden, "batch", "length", "mlp")
    return dense(hidden, "blf,fd->bld", params["down"]["kernel"], params["down"].get("bias"))
