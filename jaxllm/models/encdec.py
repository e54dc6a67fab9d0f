"""The encoder-decoder of T5 (arXiv 1910.10683), v1.0, v1.1 and FLAN: relative positions, attention scores that are not scaled.

Relative positions are a bias on the scores, so attention is the plain one, which forms scores [b, h, l, s] (see `kernels`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxllm.core.sharding import shard
from jaxllm.core.spec import Spec, SpecTree, count, stack
from jaxllm.core.types import Head, Model, Output, UserError
from jaxllm.models import attention, ffn, relative
from jaxllm.models import stack as layer_stack
from jaxllm.models.layers import norm, norm_specs, normal, padded


@dataclass(frozen=True)
class EncDecConfig:
    """An architecture. The defaults are the parts of v1.1; v1.0 has relu and a tied head."""

    vocab_size: int
    max_length: int = 512  # what data is packed to, of inputs and of targets; positions themselves know no bound
    d_model: int = 128
    n_layers: int = 2  # of the encoder
    n_decoder_layers: int | None = None  # None: as many as n_layers
    n_heads: int = 4
    head_dim: int | None = None  # None: d_model / n_heads
    d_ff: int = 256
    activation: str = "geglu"  # relu (v1.0) | geglu (v1.1, FLAN) | swiglu (UL2)
    tied: bool = False  # the head is the embedding transposed
    scaled: bool | None = None  # the decoder's output times d_model ** -0.5; None: when tied, as in every published size
    start_id: int = 0  # what the decoder reads first: T5's pad
    buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    dtype: str = "float32"  # of activations; parameters stay float32
    remat: str = "none"  # of stack.POLICIES: none | dots | attention | full | offload
    unroll: bool = False

    @property
    def decoder_layers(self) -> int:
        return self.n_decoder_layers or self.n_layers

    @property
    def dim_head(self) -> int:
        return self.head_dim or self.d_model // self.n_heads

    @property
    def scales(self) -> bool:
        return self.tied if self.scaled is None else self.scaled

    @property
    def padded_vocab(self) -> int:
        return padded(self.vocab_size)


ALLOWED = {
    "activation": ("relu", "geglu", "swiglu"),
    "remat": tuple(layer_stack.POLICIES),
    "dtype": ("float32", "bfloat16", "float16"),
}


@struct.dataclass
class Encoded:
    """What the decoder reads: states [b, s, d] of the encoder, and segments [b, s] (0 is padding)."""

    states: jax.Array
    segments: jax.Array


@struct.dataclass
class Cache:
    """layers: for each decoder layer (k, v), each [b, h, slots, k]; length int [b]: the slots filled (see attention.KVCache).

    cross: for each layer (k, v), each [b, h, s, k], of the encoder's states, and source [b, s]: their segments. Empty until
    `apply` is given a context; later calls need none.
    """

    layers: tuple[tuple[jax.Array, ...], ...]
    length: jax.Array
    cross: tuple[tuple[jax.Array, ...], ...] = ()
    source: jax.Array | None = None


def validate(c: EncDecConfig) -> None:
    """Raises UserError on the first thing that cannot be built."""
    for name, allowed in ALLOWED.items():
        if (value := getattr(c, name)) not in allowed:
            raise UserError(f"model.{name}={value!r}: choose one of {', '.join(allowed)}")
    for name in ("vocab_size", "max_length", "d_model", "n_layers", "decoder_layers", "n_heads", "dim_head", "d_ff"):
        if getattr(c, name) < 1:
            raise UserError(f"model.{name}={getattr(c, name)}: must be at least 1")
    if c.head_dim is None and c.d_model % c.n_heads:
        raise UserError(f"model.n_heads={c.n_heads} does not divide model.d_model={c.d_model}: change one, or give head_dim")
    if c.buckets < 4 or c.buckets % 4:
        raise UserError(
            f"model.buckets={c.buckets}: must be a multiple of 4 (two directions, each half exact and half logarithmic)"
        )
    if c.max_distance <= c.buckets // 2:
        raise UserError(f"model.max_distance={c.max_distance}: must be above half of model.buckets={c.buckets}")


def specs(c: EncDecConfig) -> SpecTree:
    """The tree of parameters: the decoder's at the top, where generation looks for layers, the encoder's under `encoder`."""
    d, v = c.d_model, c.padded_vocab

    def layer(*attentions: str) -> SpecTree:
        parts = {name: attention.specs(d, c.n_heads, c.n_heads, c.dim_head, False, 1.0) for name in attentions}
        for part in parts.values():  # scores are not scaled, so queries begin small (Mesh TensorFlow's initializer)
            part["q"]["kernel"] = replace(part["q"]["kernel"], init=normal(d * c.dim_head))
        parts["ffn"] = ffn.specs(c.activation, d, c.d_ff, False, 1.0)
        return {**{f"{name}_norm": norm_specs("rmsnorm", d) for name in parts}, **parts}

    def side(layers: SpecTree) -> dict[str, Any]:
        return {
            "layers": layers,
            "relative": relative.specs(c.buckets, c.n_heads, d),
            "final_norm": norm_specs("rmsnorm", d),
        }

    tree = {
        "embed": {"tokens": Spec((v, d), ("vocab", "embed"), normal(1))},
        "encoder": side(stack(layer("attention"), c.n_layers)),
        **side(stack(layer("attention", "cross"), c.decoder_layers)),
    }
    if not c.tied:
        tree["head"] = {"kernel": Spec((d, v), ("embed", "vocab"), normal(d))}
    return tree


def published_count(c: EncDecConfig) -> int:
    """The number of parameters without the rows that pad the vocabulary."""
    padding = (c.padded_vocab - c.vocab_size) * c.d_model
    return count(specs(c)) - padding * (1 if c.tied else 2)


def make(c: EncDecConfig) -> Model:
    """The model of a config. Raises UserError when the config cannot be built."""
    validate(c)

    def encode(params, inputs):
        """{tokens int [b, s], segments [b, s] (without: one segment, no padding)} -> Encoded."""
        tokens = inputs["tokens"]
        segments = inputs.get("segments")
        segments = jnp.ones(tokens.shape, jnp.int32) if segments is None else segments
        return Encoded(_encode(c, params, tokens, segments), segments)

    def apply(
        params, tokens, *, positions=None, segments=None, cache=None, embeds=None, context=None, types=None, rng=None, taps=()
    ):
        """The decoder: tokens int [b, l] under context (from `encode`) -> Output(hidden [b, l, d], scaled if the config says so).

        Segment j reads the context's segment j. With a cache a row is one segment, and segments only tell padding (0); the
        context is given once, with the first tokens. taps may name `layer_inputs`: aux has [n, b, l, d].
        """
        if positions is not None or types is not None:
            raise ValueError("an encoder-decoder takes neither `positions` (they are relative) nor `types`")
        if context is None and (cache is None or not cache.cross):
            raise ValueError("an encoder-decoder needs context=model.encode(params, inputs)")
        x = params["embed"]["tokens"][tokens] if embeds is None else embeds
        segments = jnp.ones(x.shape[:2], jnp.int32) if segments is None else segments
        x = shard(x.astype(c.dtype), "batch", "residual", None)
        block, caches, source = _decoder_block(c, params, segments, context, cache)
        x, caches, aux = layer_stack.run(
            block, params["layers"], x, caches, remat=c.remat, unroll=c.unroll, tap="layer_inputs" in taps
        )
        if cache is not None:
            own, cross = zip(*caches, strict=True)
            cache = Cache(own, cache.length + jnp.sum(segments != 0, axis=1, dtype=jnp.int32), cross, source)
        hidden = norm(params["final_norm"], x, c.norm_eps)
        return Output(hidden * c.d_model**-0.5 if c.scales else hidden, cache, aux)

    def head(params):
        return Head(params["embed"]["tokens"].T if c.tied else params["head"]["kernel"], vocab_size=c.vocab_size)

    def init_cache(batch, length, dtype=None):
        shape = (c.n_heads, c.dim_head)
        empty = attention.init_cache(c.decoder_layers, batch, length, (shape, shape), dtype or c.dtype)
        return Cache(empty.layers, empty.length)

    return Model(c, specs(c), apply, head, init_cache, encode)


def _encode(c: EncDecConfig, params: Any, tokens: jax.Array, segments: jax.Array) -> jax.Array:
    """The encoder's states [b, s, d] after its final norm: tokens see their own segment, before and after them."""
    side, at = params["encoder"], jnp.arange(tokens.shape[1])
    mask = attention.full_mask(segments)
    bias = relative.bias(side["relative"]["bias"], at, at, bidirectional=True, max_distance=c.max_distance)

    def block(layer, x, cache):
        y, _ = attention.apply(layer["attention"], norm(layer["attention_norm"], x, c.norm_eps), mask, scale=1.0, bias=bias)
        return _feed_forward(c, layer, x + y), cache, {}

    x = shard(params["embed"]["tokens"][tokens].astype(c.dtype), "batch", "residual", None)
    x, _, _ = layer_stack.run(block, side["layers"], x, remat=c.remat, unroll=c.unroll)
    return norm(side["final_norm"], x, c.norm_eps)


def _feed_forward(c: EncDecConfig, layer: Any, x: jax.Array) -> jax.Array:
    x = shard(x, "batch", "residual", None)
    return shard(x + ffn.apply(layer["ffn"], norm(layer["ffn_norm"], x, c.norm_eps), c.activation), "batch", "residual", None)


def _decoder_block(c: EncDecConfig, params: Any, segments: jax.Array, context: Encoded | None, cache: Cache | None):
    """(block, a cache for each layer or None, the context's segments). A layer's cache is ((k, v), cross (k, v) or None)."""
    table, at = params["relative"]["bias"], jnp.arange(segments.shape[1])
    source = cache.source if context is None else context.segments
    if cache is None:
        positions, mask, caches = None, attention.causal_mask(segments), None
        bias = relative.bias(table, at, at, bidirectional=False, max_distance=c.max_distance)
        cross_mask = attention.full_mask(segments, source)
    else:
        slots = cache.layers[0][0].shape[2]
        positions = cache.length[:, None] + at[None, :]
        mask = attention.cache_mask(positions, slots)
        bias = relative.bias(table, positions, jnp.arange(slots), bidirectional=False, max_distance=c.max_distance)
        cross_mask = attention.full_mask(jnp.ones_like(segments), source)
        caches = list(zip(cache.layers, [None] * len(cache.layers) if context is not None else cache.cross, strict=True))

    def block(layer, x, cache):
        own, kv = (None, None) if cache is None else cache
        h = norm(layer["attention_norm"], x, c.norm_eps)
        y, own = attention.apply(layer["attention"], h, mask, positions=positions, cache=own, scale=1.0, bias=bias)
        x = shard(x + y, "batch", "residual", None)
        kv = attention.keys_values(layer["cross"], context.states) if kv is None else kv
        x = x + attention.cross(layer["cross"], norm(layer["cross_norm"], x, c.norm_eps), kv, cross_mask, scale=1.0)
        return _feed_forward(c, layer, x), None if cache is None else (own, kv), {}

    return block, caches, source


TINY = EncDecConfig(
    vocab_size=1024, max_length=128, d_model=96, n_layers=2, n_heads=3, head_dim=32, d_ff=192, max_distance=64, unroll=True
)


def _t5(d: int, layers: int, heads: int, d_ff: int, head_dim: int = 64, **more: Any) -> EncDecConfig:
    """A published size; the vocabulary of 32,000 pieces and 100 sentinels is padded to 32,128 in the published weights."""
    return EncDecConfig(vocab_size=32_128, d_model=d, n_layers=layers, n_heads=heads, head_dim=head_dim, d_ff=d_ff, **more)


V1 = {"activation": "relu", "tied": True}
PRESETS: dict[str, EncDecConfig] = {
    "tiny": TINY,
    "t5-small": _t5(512, 6, 8, 2048, **V1),
    "t5-base": _t5(768, 12, 12, 3072, **V1),
    "t5-large": _t5(1024, 24, 16, 4096, **V1),
    "t5-3b": _t5(1024, 24, 32, 16_384, 128, **V1),
    "t5-11b": _t5(1024, 24, 128, 65_536, 128, **V1),
    "t5-v1.1-small": _t5(512, 8, 6, 1024),
    "t5-v1.1-base": _t5(768, 12, 12, 2048),
    "t5-v1.1-large": _t5(1024, 24, 16, 2816),
    "t5-v1.1-xl": _t5(2048, 24, 32, 5120),
    "t5-v1.1-xxl": _t5(4096, 24, 64, 10_240),
}
# FLAN-T5 (arXiv 2210.11416) is v1.1 trained on
PRESETS |= {name.replace("t5-v1.1", "flan-t5"): c for name, c in PRESETS.items() if "v1.1" in name}
