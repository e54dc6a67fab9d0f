"""Norms, activations, rotary positions and initializers. Einsum letters are the same everywhere: b l s d h g k f v n."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.core.spec import Initializer, Spec, SpecTree

ones, zeros = jax.nn.initializers.ones, jax.nn.initializers.zeros

VOCAB_MULTIPLE = 128  # vocabularies are padded to this in memory, so that they shard and tile


def padded(vocab_size: int) -> int:
    """The number of rows that a vocabulary has in memory."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


C, CUBE = math.sqrt(2 / math.pi), 0.044715  # of GELU's tanh form


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) (arXiv 1606.08415), which keeps x alone for its gradient."""
    return 0.5 * x * (1 + jnp.tanh(C * (x + CUBE * x**3)))


def _gelu_backward(x: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    # (1 + tanh z) / 2 is sigmoid(2 z): written so, the compiler does not find the forward pass's tanh and keep it in memory
    gate = jax.nn.sigmoid(2 * C * (x + CUBE * x**3))
    return (grad * (gate + x * gate * (1 - gate) * 2 * C * (1 + 3 * CUBE * x * x)),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,  # the tanh form: GPT-2, Gemma, T5 v1.1
    "gelu_exact": partial(jax.nn.gelu, approximate=False),  # the erf form: BERT
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # ImageGPT
}


def normal(fan_in: int, scale: float = 1.0) -> Initializer:
    """Normal with standard deviation scale / sqrt(fan_in), whatever the layout of the kernel."""
    return jax.nn.initializers.normal(scale / fan_in**0.5)


def norm_specs(kind: str, d: int) -> SpecTree:
    """`rmsnorm`: a scale; `rmsnorm_offset`: its difference from 1 (Gemma); `layernorm`: a scale and a bias."""
    if kind == "rmsnorm_offset":
        return {"offset": Spec((d,), ("embed",), zeros)}
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
    y = y * (1 + _row(params["offset"], y) if "offset" in params else _row(params["scale"], y))
    if "bias" in params:
        y = y + _row(params["bias"], y)
    return y.astype(x.dtype)


def _row(v: jax.Array, like: jax.Array) -> jax.Array:
    """[d] as [1, ..., d]: ranks are never promoted silently."""
    return v.astype(like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))


def dense(x: jax.Array, equation: str, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """einsum(equation, x, kernel) + bias in x's dtype; a kernel may be a record that knows its product (an adapter's)."""
    y = kernel.product(x, equation) if hasattr(kernel, "product") else _product(equation, x, kernel.astype(x.dtype))
    return y if bias is None else y + bias.astype(x.dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(equation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """einsum(equation, x, kernel) where x is [tokens ..., contracted ...] and the kernel [contracted ..., new ...]."""
    return jnp.einsum(equation, x, kernel)


def _product_backward(equation: str, kept: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    inputs, out = equation.split("->")
    left, right = inputs.split(",")
    tokens = sum(letter in out for letter in left)
    over = (tuple(range(tokens)),) * 2
    # A CPU writes the left operand of a product over tokens down transposed, and what made it with it: that is to be the
    # smaller one, not what einsum would put there. A train step takes 0.91 of the time.
    if x.size <= grad.size:
        d_kernel = jax.lax.dot_general(x, grad, (over, ((), ())))
    else:
        new = grad.ndim - tokens
        d_kernel = jax.lax.dot_general(grad, x, (over, ((), ())))
        d_kernel = d_kernel.transpose(*range(new, kernel.ndim), *range(new))
    return jnp.einsum(f"{out},{right}->{left}", grad, kernel), d_kernel


# the einsum itself, for remat policies that look for products
_product.defvjp(lambda equation, x, kernel: (jnp.einsum(equation, x, kernel), (x, kernel)), _product_backward)


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than `original_length`, the one of pretraining.

    linear: all by 1 / factor (arXiv 2306.15595). llama3: those whose wavelength is above original_length / low_factor by
    1 / factor, those below original_length / high_factor not at all, a linear blend between (arXiv 2407.21783).
    yarn: the same idea by the number of rotations over original_length, beta_slow to beta_fast, and attention is warmed
    by attention_factor (arXiv 2309.00071); DeepSeek sets it by mscale / mscale_all_dim.
    """

    kind: str  # linear | llama3 | yarn
    factor: float
    original_length: int = 0
    low_factor: float = 1.0
    high_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True  # yarn's first and last blended frequency are whole numbers


class Frequencies(NamedTuple):
    """Rotary frequencies [k / 2] in radians per position, and the factor on what is rotated (1 but for yarn)."""

    inverse: jax.Array
    factor: float = 1.0


def frequencies(dim: int, theta: float, scaling: RopeScaling | None = None) -> Frequencies:
    """Frequency i of dim / 2 is theta ** (-2i / dim), then scaled."""
    half = dim // 2
    plain = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is None:
        return Frequencies(plain)
    if scaling.kind == "linear":
        return Frequencies(plain / scaling.factor)
    if scaling.kind == "llama3":
        turns = scaling.original_length * plain / (2 * math.pi)
        keep = jnp.clip((turns - scaling.low_factor) / (scaling.high_factor - scaling.low_factor), 0, 1)
        return Frequencies((keep + (1 - keep) / scaling.factor) * plain)
    # yarn: the index of the frequency that turns so often over the original length
    at = [
        dim * math.log(scaling.original_length / (beta * 2 * math.pi)) / (2 * math.log(theta))
        for beta in (scaling.beta_fast, scaling.beta_slow)
    ]
    low, high = (math.floor(at[0]), math.ceil(at[1])) if scaling.truncate else at
    low, high = max(low, 0), min(high, dim - 1)
    stretch = jnp.clip((jnp.arange(half, dtype=jnp.float32) - low) / max(high - low, 0.001), 0, 1)
    return Frequencies(plain * (1 - stretch + stretch / scaling.factor), yarn_factor(scaling))


def yarn_factor(scaling: RopeScaling) -> float:
    """What yarn multiplies rotated queries and keys by: 0.1 ln(factor) + 1 (arXiv 2309.00071), or as DeepSeek's mscale says."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return yarn_mscale(scaling.factor, 1.0)


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 mscale ln(factor) + 1, and 1 where nothing is stretched."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope(x: jax.Array, positions: jax.Array, frequency: Frequencies) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864) on halves, as Llama's published weights expect.

    x [b, l, h, k], positions int [b, l] -> [b, l, h, k].
    """
    half = x.shape[-1] // 2
    angle = positions[..., None, None].astype(jnp.float32) * frequency.inverse.reshape(1, 1, 1, half)
    cos, sin = jnp.cos(angle) * frequency.factor, jnp.sin(angle) * frequency.factor
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def segment_positions(segments: jax.Array) -> jax.Array:
    """Positions that restart at 0 where the segment id changes: [b, l] -> [b, l]."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1])[None, :], segments.shape)
    starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
