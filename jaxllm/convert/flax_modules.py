"""A jaxllm Model as a Flax module, for code and tools built on Flax: same parameters, same outputs.

    module = flax_modules.to_linen(model)              # module.apply({"params": params}, tokens) -> logits
    module = flax_modules.to_nnx(model, params)        # module(tokens) -> logits; nnx.split, nnx.Optimizer, ...

Both are thin: `params` is our tree in both, under the same paths, and what is computed is the Model's own `apply`.
Inheritance stands here because Flax asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from flax import linen, nnx

from jaxllm.core import ops, spec
from jaxllm.core.types import Key, Model, Output, Params


@dataclass(frozen=True, eq=False)
class _Held:
    """A Model that Flax neither copies nor freezes: modules are equal when they hold the same one."""

    model: Model


class LinenModel(linen.Module):
    """tokens int [b, l] -> logits [b, l, vocab_size]; `method="outputs"` gives what Model.apply gives."""

    held: _Held

    @linen.compact
    def outputs(self, tokens: jax.Array, **options: Any) -> Output:
        """Model.apply with this module's parameters; options: segments, positions, cache, embeds, taps, ..."""
        return self.held.model.apply(self._params(), tokens, **options)

    @linen.compact
    def __call__(self, tokens: jax.Array, **options: Any) -> jax.Array:
        """Logits of every position."""
        params, model = self._params(), self.held.model
        return ops.logits(model.head(params), model.apply(params, tokens, **options).hidden)

    def _params(self) -> Params:
        specs = self.held.model.specs
        return {root: self.param(root, lambda key, root=root: spec.init({root: specs[root]}, key)[root]) for root in specs}


class NNXModel(nnx.Module):
    """tokens int [b, l] -> logits [b, l, vocab_size]; `params` is the Model's tree with an nnx.Param at every leaf."""

    def __init__(self, model: Model, params: Params) -> None:
        self.held = _Held(model)
        self.params = nnx.data(jax.tree.map(nnx.Param, params))

    def outputs(self, tokens: jax.Array, **options: Any) -> Output:
        """Model.apply with this module's parameters; options: segments, positions, cache, embeds, taps, ..."""
        return self.held.model.apply(self.tree(), tokens, **options)

    def __call__(self, tokens: jax.Array, **options: Any) -> jax.Array:
        """Logits of every position."""
        params, model = self.tree(), self.held.model
        return ops.logits(model.head(params), model.apply(params, tokens, **options).hidden)

    def tree(self) -> Params:
        """The parameters as plain arrays: what every other part of jaxllm takes."""
        return jax.tree.map(lambda p: p[...], self.params, is_leaf=lambda x: isinstance(x, nnx.Param))


def to_linen(model: Model) -> LinenModel:
    """A Linen module; `init` draws new parameters, `apply` takes {"params": params} of this Model."""
    return LinenModel(_Held(model))


def to_nnx(model: Model, params: Params | None = None, *, key: Key | None = None) -> NNXModel:
    """An NNX module that holds `params`, or, without them, new ones drawn with `key`."""
    if params is None:
        params = spec.init(model.specs, jax.random.key(0) if key is None else key)
    return NNXModel(model, params)
