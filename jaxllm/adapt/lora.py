"""LoRA (arXiv 2106.09685): W + s A B with A and B of low rank beside kernels W that stay as they are.

An adapted model is a Model whose specs have one more subtree, `lora`. Without it the same functions are the base model: policy
and reference are one tree, with and without `lora`. A LossFn never sees the difference: train `policy/lora/`, freeze the rest.

The update is applied low-rank where the input meets the kernel: y = x W + s (x A) B. The other way, to form W + s A B once a
step and differentiate through it, needs nothing of the models, but its backward pass makes the whole gradient of every adapted
kernel before it is contracted to those of A and B, holds a second copy of the kernels, and rounds the update away when weights
are used in bfloat16. Measured on two CPU cores, all kernels of a decoder of 8 layers, width 512, rank 8, 4 x 256 tokens: a step
takes 0.78 of its time (five interleaved pairs: 0.67 to 0.87) and 0.76 of its temporary memory. Kernels that are used otherwise
(see `WHOLE`, and MLA's absorbed projection in decoding) are merged where they are used. For long generations `merge` first:
nothing is then added to a token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxllm.core.spec import Initializer, Spec, SpecTree
from jaxllm.core.tree import flatten, unflatten
from jaxllm.core.types import Head, Model, Params, UserError

Scaling = Callable[[float, int], float]  # (alpha, rank) -> s
STACKED = ("layers", "experts")  # leading axes of kernels that are held together
# grouped products over experts, and recurrences with a backward pass of their own, want plain arrays
WHOLE = re.compile(r"(^|/)(experts/\w+|recurrent|projection)/kernel$")


def standard(alpha: float, rank: int) -> float:
    """alpha / rank (arXiv 2106.09685, section 4.1)."""
    return alpha / rank


def rslora(alpha: float, rank: int) -> float:
    """alpha / sqrt(rank): the update's size does not fall with the rank (arXiv 2312.03732)."""
    return alpha / math.sqrt(rank)


SCALINGS = {"standard": standard, "rslora": rslora}  # by the name that configs and checkpoints have


@struct.dataclass
class LowRank:
    """A kernel [*stack, *inputs, *outputs] with a [*stack, *inputs, r] and b [*stack, r, *outputs], in the kernel's place.

    It slices and stacks like an array, for it is a tree of them. `product` and `astype` are what the models ask of a kernel.
    """

    kernel: jax.Array
    a: jax.Array
    b: jax.Array
    scale: float = struct.field(pytree_node=False)

    def product(self, x: jax.Array, equation: str) -> jax.Array:
        """einsum(equation, x, kernel) + scale (x a) b in x's dtype."""
        left, kernel, out = re.split(",|->", equation)
        y = jnp.einsum(equation, x, self.kernel.astype(x.dtype))
        inputs, outputs = kernel[: self.a.ndim - 1], kernel[self.a.ndim - 1 :]
        kept = "".join(c for c in left if c not in inputs)
        low = jnp.einsum(f"{left},{inputs}z->{kept}z", x, self.a.astype(x.dtype)) * self.scale
        return y + jnp.einsum(f"{kept}z,z{outputs}->{out}", low, self.b.astype(x.dtype))

    def astype(self, dtype: Any) -> jax.Array:
        """The merged kernel."""
        return merged(self.kernel, self.a, self.b, self.scale).astype(dtype)


def merged(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """kernel + scale a b, formed in float32 at least, in the kernel's dtype."""
    letters = "abcdefgh"[: kernel.ndim]
    stack = a.ndim + b.ndim - 2 - kernel.ndim
    cut = a.ndim - 1
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    equation = f"{letters[:cut]}z,{letters[:stack]}z{letters[cut:]}->{letters}"
    update = jnp.einsum(equation, a.astype(wide), b.astype(wide)) * scale
    return (kernel.astype(wide) + update).astype(kernel.dtype)


def with_lora(model: Model, *, rank: int, alpha: float, match: str, scaling: Scaling = standard) -> Model:
    """The model with adapters on every kernel whose path has a match of `match`, such as "attention/(q|v)/kernel".

    specs gain `lora/<path of the kernel>/{a, b}`: a uniform in +-1/sqrt(inputs), b zero, so that the start is the base model.
    scaling(alpha, rank) is the factor s. apply, head and encode take params with `lora`, or without: then they are the base's.
    UserError: nothing matches, a rank below 1, or a model that has adapters already.
    """
    if rank < 1:
        raise UserError(f"lora.rank={rank}: must be at least 1")
    if "lora" in model.specs:
        raise UserError("the model has adapters already: merge them first (lora.merge)")
    pairs = {path: _pair(path, spec, rank) for path, spec in _kernels(model.specs, match).items()}
    scale = scaling(alpha, rank)

    def bound(params: Params) -> Params:
        base, adapters = split(params)
        return base if adapters is None else _bind(base, adapters, scale)

    def apply(params: Params, *args: Any, **options: Any) -> Any:
        return model.apply(bound(params), *args, **options)

    def head(params: Params) -> Head:
        found = model.head(bound(params))
        return found.replace(kernel=found.kernel.astype(found.kernel.kernel.dtype)) if _is_low(found.kernel) else found

    def encode(params: Params, inputs: Any) -> Any:
        return model.encode(bound(params), inputs)

    return model._replace(specs={**model.specs, "lora": unflatten(pairs)}, apply=apply, head=head, encode=model.encode and encode)


def split(params: Params) -> tuple[Params, Params | None]:
    """(the base, the adapters or None): views of one tree, nothing is copied."""
    return {name: x for name, x in params.items() if name != "lora"}, params.get("lora")


def merge(params: Params, *, alpha: float, scaling: Scaling = standard) -> Params:
    """Plain parameters of the base model, W + s a b where there were adapters; params without `lora` as they are."""
    base, adapters = split(params)
    flat = flatten(base)
    pairs = flatten(adapters or {})
    for path in sorted({p.rpartition("/")[0] for p in pairs}):
        a, b = pairs[f"{path}/a"], pairs[f"{path}/b"]
        flat[path] = merged(flat[path], a, b, scaling(alpha, a.shape[-1]))
    return unflatten(flat)


def _is_low(x: Any) -> bool:
    return isinstance(x, LowRank)


def _kernels(specs: SpecTree, match: str) -> dict[str, Spec]:
    """The kernels whose path matches. UserError with what there is."""
    found = {p: s for p, s in flatten(specs).items() if p.endswith("/kernel") and len(s.shape) - _stacked(s) >= 2}
    try:
        chosen = {p: s for p, s in found.items() if re.search(match, p)}
    except re.error as error:
        raise UserError(f"lora.match={match!r} is no regular expression: {error}") from None
    if not chosen:
        raise UserError(f"lora.match={match!r} matches no kernel: there are {', '.join(sorted(found))}")
    return chosen


def _stacked(spec: Spec) -> int:
    return next((i for i, axis in enumerate(spec.axes) if axis not in STACKED), len(spec.axes))


def _pair(path: str, spec: Spec, rank: int) -> dict[str, Spec]:
    """Specs of a and b. A kernel of three dimensions has two of inputs when its last axis is `embed` (o), else one (q)."""
    n = _stacked(spec)
    cut = n + (2 if len(spec.shape) - n == 3 and spec.axes[-1] == "embed" else 1)
    fan_in = math.prod(spec.shape[n:cut])
    a = Spec((*spec.shape[:cut], rank), (*spec.axes[:cut], None), _uniform(fan_in), jnp.float32)
    b = Spec((*spec.shape[:n], rank, *spec.shape[cut:]), (*spec.axes[:n], None, *spec.axes[cut:]), jax.nn.initializers.zeros)
    return {"a": a, "b": b}


def _uniform(fan_in: int) -> Initializer:
    bound = fan_in**-0.5
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def _bind(base: Any, adapters: Any, scale: float, path: str = "") -> Any:
    """The base with a LowRank in the place of every adapted kernel; layers may have been unstacked to a tuple."""
    if isinstance(base, tuple):
        return tuple(_bind(x, jax.tree.map(lambda p, i=i: p[i], adapters), scale, path) for i, x in enumerate(base))
    if isinstance(base, dict):
        return {n: _bind(x, adapters[n], scale, f"{path}/{n}") if n in adapters else x for n, x in base.items()}
    if WHOLE.search(path):
        return merged(base, adapters["a"], adapters["b"], scale)
    return LowRank(base, adapters["a"], adapters["b"], scale)
