"""Norms, rotary positions and initializers. Einsum letters are the same everywhere: b l s d h g k f v n."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.core.spec import Initializer, Spec, SpecTree

ones, zeros = jax.nn.initializers.ones, jax.nn.initializers.zeros


def normal(fan_in: int, scale: float = 1.0) -> Initializer:
    """Normal with standard deviation scale / sqrt(fan_in), whatever the layout of the kernel."""
    return jax.nn.initializers.normal(scale / fan_in**0.5)


def norm_specs(kind: str, d: int) -> SpecTree:
    """`rmsnorm`: a scale; `layernorm`: a scale and a bias."""
    scale = {"scale": Spec((d,), ("embed",), ones)}
    return scale if kind == "rmsnorm" else scale | {"bias": Spec((d,), ("embed",), zeros)}


def norm(params: SpecTree, x: jax.Array, eps: float) -> jax.Array:
    """LayerNorm (arXiv 1607.06450) when a bias is there, RMSNorm (arXiv 1910.07467) when not; computed in float32.

    x [..., d] -> [..., d] in x's dtype.
    """
    y = x.astype(jnp.float32)
    if "bias" in params:
        y = y - y.mean(axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    y = y * _row(params["scale"], y)
    if "bias" in params:
        y = y + _row(params["bias"], y)
    return y.astype(x.dtype)


def _row(v: jax.Array, like: jax.Array) -> jax.Array:
    """[d] as [1, ..., d]: ranks are never promoted silently."""
    return v.astype(like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))


def dense(x: jax.Array, equation: str, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """einsum(equation, x, kernel) + bias in x's dtype."""
    y = jnp.einsum(equation, x, kernel.astype(x.dtype))
    return y if bias is None else y + bias.astype(x.dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


def rope(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864) on halves, as Llama's published weights expect.

    x [b, l, h, k], positions int [b, l] -> [b, l, h, k]; frequency i of k/2 is theta ** (-2i / k).
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency.reshape(1, 1, 1, half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def segment_positions(segments: jax.Array) -> jax.Array:
    """Positions that restart at 0 where the segment id changes: [b, l] -> [b, l]."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1])[None, :], segments.shape)
    starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
