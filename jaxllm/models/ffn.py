"""Feed-forward blocks."""

from __future__ import annotations

from typing import Any

import jax

from jaxllm.core.sharding import shard
from jaxllm.core.spec import Spec, SpecTree
from jaxllm.models.layers import dense, normal, zeros


def specs(kind: str, d: int, f: int, bias: bool, residual_scale: float) -> SpecTree:
    """`gelu`: up and down; `swiglu`: gate, up and down."""
    names = ("gate", "up") if kind == "swiglu" else ("up",)
    tree = {n: {"kernel": Spec((d, f), ("embed", "mlp"), normal(d))} for n in names}
    tree["down"] = {"kernel": Spec((f, d), ("mlp", "embed"), normal(f, residual_scale))}
    if bias:
        for name in names:
            tree[name]["bias"] = Spec((f,), ("mlp",), zeros)
        tree["down"]["bias"] = Spec((d,), ("embed",), zeros)
    return tree


def apply(params: Any, x: jax.Array) -> jax.Array:
    """down(gelu(up(x))) (tanh form, as GPT-2), or with a gate down(silu(gate(x)) * up(x)) (SwiGLU, arXiv 2002.05202)."""
    up = dense(x, "bld,df->blf", params["up"]["kernel"], params["up"].get("bias"))
    if "gate" in params:
        hidden = jax.nn.silu(dense(x, "bld,df->blf", params["gate"]["kernel"], params["gate"].get("bias"))) * up
    else:
        hidden = jax.nn.gelu(up, approximate=True)
    hidden = shard(hidden, "batch", None, "mlp")
    return dense(hidden, "blf,fd->bld", params["down"]["kernel"], params["down"].get("bias"))
