"""Kernels in int8 with a scale for each output channel: a quarter of float32's bytes, for sampling.

Weights only, symmetric (the W8A16 of arXiv 2206.01861): the product reads int8 and is made in the activations' dtype.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxllm.core.spec import Spec
from jaxllm.core.tree import flatten, unflatten
from jaxllm.core.types import Model, Params, UserError

STACKED = ("layers", "experts")  # leading axes of kernels that are held together
# what attention and feed-forward networks multiply by; routers choose by small differences and stay as they are
KERNELS = r"(^|/)(attention|cross|ffn)/((?!router/).)*kernel$"
LARGEST = 127


@struct.dataclass
class Int8:
    """A kernel [*stack, *inputs, *outputs]: values int8 of that shape, scale float32 [*stack, 1 for each input, *outputs].

    It slices and stacks like an array, for it is a tree of them. `product` and `astype` are what the models ask of a kernel.
    """

    values: jax.Array
    scale: jax.Array

    def product(self, x: jax.Array, equation: str) -> jax.Array:
        """einsum(equation, x, values) * scale, in x's dtype."""
        left, kernel, _ = re.split(",|->", equation)
        outputs = sum(letter not in left for letter in kernel)
        y = jnp.einsum(equation, x, self.values.astype(x.dtype), preferred_element_type=jnp.float32)
        return (y * self.scale.reshape((1,) * (y.ndim - outputs) + self.scale.shape[-outputs:])).astype(x.dtype)

    def astype(self, dtype: Any) -> jax.Array:
        """The kernel: values * scale."""
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


def quantize(model: Model, params: Params, match: str = KERNELS) -> Params:
    """params with an Int8 in the place of every kernel whose path has a match of `match`; embeddings and head stay.

    scale = max |W| / 127 over the inputs, so |W - values * scale| <= scale / 2. Where weights are trained, call it inside the
    jitted sampler: what is sampled from follows them. UserError: nothing matches.
    """
    flat = flatten(params)
    specs = {p: s for p, s in flatten(model.specs).items() if re.search(match, p) and len(s.shape) - _stacked(s) >= 2}
    if not specs:
        raise UserError(f"quantize: {match!r} matches no kernel of {type(model.config).__name__}")
    return unflatten({path: _int8(x, specs[path]) if path in specs else x for path, x in flat.items()})


def _stacked(spec: Spec) -> int:
    return next((i for i, axis in enumerate(spec.axes) if axis not in STACKED), len(spec.axes))


def _int8(kernel: jax.Array, spec: Spec) -> Int8:
    """A kernel of three dimensions has two of inputs when its last axis is `embed` (o), else one (q)."""
    n = _stacked(spec)
    inputs = 2 if len(spec.shape) - n == 3 and spec.axes[-1] == "embed" else 1
    wide = kernel.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=tuple(range(n, n + inputs)), keepdims=True) / LARGEST
    values = jnp.round(wide / jnp.where(scale == 0, 1.0, scale))
    return Int8(values.astype(jnp.int8), scale)
