"""Heads that read a whole sequence, every token, a span or a set of choices: on an encoder, or on any other trunk.

A head takes a Model and returns one. `model.head(params)` is its linear map, so its scores are one call for all of them:
`ops.logits(model.head(params), model.apply(params, tokens, segments=...).hidden)`, [b, labels] for sequences and choices,
[b, l, labels] for tokens and spans. Its weights are the trunk's and a leaf `classifier`; see `graft`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.core import ops
from jaxllm.core.spec import Spec
from jaxllm.core.types import Head, Model, Output, Params, UserError
from jaxllm.models import families
from jaxllm.models.layers import dense, normal, zeros


@dataclass(frozen=True)
class PooledConfig:
    """A trunk's config, as `families.to_dict` writes it, and the head on it. pool, layer: see `with_sequence_head`."""

    trunk: dict[str, Any]
    head: str  # a key of HEADS
    n_labels: int = 2
    pool: str = "first"
    layer: int | None = None
    dtype: str = ""  # of activations; empty: the trunk's

    @property
    def vocab_size(self) -> int:
        return families.from_dict(self.trunk).vocab_size

    @property
    def max_length(self) -> int:
        return families.from_dict(self.trunk).max_length

    @property
    def d_model(self) -> int:
        return families.from_dict(self.trunk).d_model


def with_sequence_head(model: Model, n_labels: int, pool: str = "first", layer: int | None = None) -> Model:
    """One set of scores a row: hidden [b, d] is pooled over the row's tokens, all of one segment or several.

    pool: "first" (through BERT's pooler, dense and tanh, where the trunk has one), "mean", or "last", which a causal trunk
    needs. layer: read the states before layer `layer`, 0 .. n - 1 (0: the embeddings), and not the last ones: for probes.
    """
    return _on(model, PooledConfig(families.to_dict(model.config), "sequence", n_labels, pool, layer))


def with_token_head(model: Model, n_labels: int, layer: int | None = None) -> Model:
    """Scores for every token: hidden [b, l, d]."""
    return _on(model, PooledConfig(families.to_dict(model.config), "token", n_labels, layer=layer))


def with_span_head(model: Model) -> Model:
    """Two scores for every token, of being the answer's first and its last: hidden [b, l, d]."""
    return _on(model, PooledConfig(families.to_dict(model.config), "span", 2))


def with_choice_head(model: Model, pool: str = "first") -> Model:
    """One score a choice: tokens, segments and types are [b, choices, l], hidden is [b, choices, d] (arXiv 1810.04805, 4.4)."""
    return _on(model, PooledConfig(families.to_dict(model.config), "choice", 1, pool))


def with_next_sentence_head(model: Model) -> Model:
    """The model itself, hidden and head as they are, whose aux also has `next_sentence`: scores [b, 2] of BERT's
    two labels, next and not next, from the pooled first position (arXiv 1810.04805, task 2)."""
    return _on(model, PooledConfig(families.to_dict(model.config), "next_sentence", 2))


def with_head(model: Model, head: str, n_labels: int, pool: str = "first", layer: int | None = None) -> Model:
    """Any of the heads by its name in HEADS; n_labels counts where the head does not fix it."""
    return _on(model, PooledConfig(families.to_dict(model.config), head, FIXED.get(head, n_labels), pool, layer))


def make(c: PooledConfig) -> Model:
    """The model of a config, trunk and head. Raises UserError on an unknown head or pool."""
    return _on(trunk_of(c), c)


def trunk_of(c: PooledConfig) -> Model:
    """The trunk alone."""
    return families.make(families.from_dict({**c.trunk, "dtype": c.dtype} if c.dtype else c.trunk))


def _on(trunk: Model, c: PooledConfig) -> Model:
    """The trunk with the config's head."""
    for name, value, table in (("head", c.head, HEADS), ("pool", c.pool, POOLS)):
        if value not in table:
            raise UserError(f"model.{name}={value!r}: choose one of {', '.join(table)}")
    if c.n_labels < 1:
        raise UserError(f"model.n_labels={c.n_labels}: must be at least 1")
    d, n = c.d_model, c.n_labels
    leaf = {"kernel": Spec((d, n), ("embed", None), normal(d)), "bias": Spec((n,), (None,), zeros)}

    def head(params: Params) -> Head:
        return Head(params["classifier"]["kernel"], params["classifier"]["bias"], vocab_size=n)

    if c.head == "next_sentence":
        head = trunk.head
    return trunk._replace(config=c, specs={**trunk.specs, "classifier": leaf}, apply=partial(HEADS[c.head], c, trunk), head=head)


def scores(model: Model, params: Params, record: Any) -> jax.Array:
    """The scores of a record's rows, float32: [b, n], or [b, l, n] from heads that read every token."""
    hidden = model.apply(params, record["tokens"], segments=record["segments"], types=record.get("types")).hidden
    return ops.logits(model.head(params), hidden)


def graft(params: Params, trunk: Params) -> Params:
    """Freshly initialised parameters of a model with a head, with the trunk's weights in place of its own where it has them."""
    return {name: trunk.get(name, fresh) for name, fresh in params.items()}


# ---- what a head reads


def states(output: Output, layer: int | None = None) -> jax.Array:
    """[b, l, d]: the trunk's last states before any transform, or those before layer `layer`."""
    return output.aux.get("states", output.hidden) if layer is None else output.aux["layer_inputs"][layer]


def _first(x: jax.Array, real: jax.Array) -> jax.Array:
    return x[:, 0]


def _last(x: jax.Array, real: jax.Array) -> jax.Array:
    at = jnp.maximum(real.sum(axis=1) - 1, 0)
    return jnp.take_along_axis(x, at[:, None, None], axis=1)[:, 0]


def _mean(x: jax.Array, real: jax.Array) -> jax.Array:
    weights = real.astype(jnp.float32) / jnp.maximum(real.sum(axis=1, keepdims=True), 1)
    return jnp.einsum("bl,bld->bd", weights, x.astype(jnp.float32)).astype(x.dtype)


POOLS: dict[str, Callable] = {"first": _first, "mean": _mean, "last": _last}


def _run(c: PooledConfig, trunk: Model, params: Params, tokens: Any, more: dict) -> Output:
    """The trunk's output with what the head reads as hidden; a trunk without token types is not given any."""
    if more.get("types") is None:
        more = {k: v for k, v in more.items() if k != "types"}
    if c.layer is not None:
        more = {**more, "taps": (*more.get("taps", ()), "layer_inputs")}
    out = trunk.apply(params, tokens, **more)
    return Output(states(out, c.layer), None, out.aux)


def _pooled(c: PooledConfig, params: Params, x: jax.Array, segments: jax.Array | None) -> jax.Array:
    """[b, l, d] -> [b, d]."""
    real = jnp.ones(x.shape[:2], bool) if segments is None else segments != 0
    y = POOLS[c.pool](x, real)
    if c.pool == "first" and "pooler" in params and c.layer is None:
        return jnp.tanh(dense(y, "bd,de->be", params["pooler"]["kernel"], params["pooler"]["bias"]))
    return y


# ---- apply of every head: (config, trunk, params, tokens, ...) -> Output


def _sequence(c: PooledConfig, trunk: Model, params: Params, tokens: Any, **more: Any) -> Output:
    out = _run(c, trunk, params, tokens, more)
    return out.replace(hidden=_pooled(c, params, out.hidden, more.get("segments")))


def _token(c: PooledConfig, trunk: Model, params: Params, tokens: Any, **more: Any) -> Output:
    return _run(c, trunk, params, tokens, more)


def _choice(c: PooledConfig, trunk: Model, params: Params, tokens: jax.Array, **more: Any) -> Output:
    b, choices = tokens.shape[:2]
    flat = lambda x: x.reshape(b * choices, *x.shape[2:])  # noqa: E731
    more = {k: flat(v) if k in ("segments", "types", "positions") and v is not None else v for k, v in more.items()}
    out = _sequence(c, trunk, params, flat(tokens), **more)
    return out.replace(hidden=out.hidden.reshape(b, choices, -1))


def _next_sentence(c: PooledConfig, trunk: Model, params: Params, tokens: Any, **more: Any) -> Output:
    out = trunk.apply(params, tokens, **more)
    pooled = _pooled(c, params, states(out), more.get("segments"))
    head = Head(params["classifier"]["kernel"], params["classifier"]["bias"], vocab_size=2)
    return out.replace(aux={**out.aux, "next_sentence": ops.logits(head, pooled)})


HEADS: dict[str, Callable] = {
    "sequence": _sequence, "token": _token, "span": _token, "choice": _choice, "next_sentence": _next_sentence,
}  # fmt: skip
FIXED = {"span": 2, "choice": 1, "next_sentence": 2}  # how many scores
