"""The decoder: GPT-2 and Llama shapes, and everything between, from one frozen config."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.core.sharding import shard
from jaxllm.core.spec import Spec, SpecTree, count, stack
from jaxllm.core.types import Head, Model, Output, UserError
from jaxllm.models import attention, ffn
from jaxllm.models import stack as layer_stack
from jaxllm.models.layers import norm, norm_specs, normal, segment_positions

VOCAB_MULTIPLE = 128  # the vocabulary is padded to this in memory, so that it shards and tiles


@dataclass(frozen=True)
class DecoderConfig:
    """An architecture. The defaults are Llama's parts; see `presets` for GPT-2's and for published sizes."""

    vocab_size: int
    max_length: int = 1024  # the context: the longest position a learned table has, and what data is packed to
    d_model: int = 128
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int | None = None  # None: as many as n_heads
    head_dim: int | None = None  # None: d_model / n_heads
    d_ff: int = 512
    positions: str = "rope"  # rope | learned
    norm: str = "rmsnorm"  # rmsnorm | layernorm
    activation: str = "swiglu"  # swiglu | gelu
    bias: bool = False
    tied: bool = True  # the output head is the embedding transposed
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    dtype: str = "float32"  # of activations; parameters stay float32
    remat: str = "none"  # none | dots | full
    unroll: bool = False

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def dim_head(self) -> int:
        return self.head_dim or self.d_model // self.n_heads

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


ALLOWED = {
    "positions": ("rope", "learned"),
    "norm": ("rmsnorm", "layernorm"),
    "activation": ("swiglu", "gelu"),
    "remat": tuple(layer_stack.POLICIES),
    "dtype": ("float32", "bfloat16", "float16"),
}


def validate(c: DecoderConfig) -> None:
    """Raises UserError on the first thing that cannot be built."""
    for name, allowed in ALLOWED.items():
        if (value := getattr(c, name)) not in allowed:
            raise UserError(f"model.{name}={value!r}: choose one of {', '.join(allowed)}")
    for name in ("vocab_size", "max_length", "d_model", "n_layers", "n_heads", "d_ff"):
        if getattr(c, name) < 1:
            raise UserError(f"model.{name}={getattr(c, name)}: must be at least 1")
    if c.head_dim is None and c.d_model % c.n_heads:
        near = [h for h in range(1, c.d_model + 1) if c.d_model % h == 0]
        best = sorted(near, key=lambda h: abs(h - c.n_heads))[:2]
        raise UserError(
            f"model.n_heads={c.n_heads} does not divide model.d_model={c.d_model}: use "
            f"n_heads={' or '.join(str(h) for h in sorted(best))}, or d_model={c.d_model // c.n_heads * c.n_heads or c.n_heads}"
        )
    if c.n_heads % c.kv_heads:
        raise UserError(f"model.n_kv_heads={c.kv_heads} does not divide model.n_heads={c.n_heads}")
    if c.positions == "rope" and c.dim_head % 2:
        raise UserError(f"head dimension {c.dim_head} is odd: rotary positions need an even one")


def specs(c: DecoderConfig) -> SpecTree:
    """The tree of parameters."""
    residual = (2 * c.n_layers) ** -0.5  # GPT-2's scaling of what is added to the residual stream
    d, v = c.d_model, c.padded_vocab
    layer = {
        "attention_norm": norm_specs(c.norm, d),
        "attention": attention.specs(d, c.n_heads, c.kv_heads, c.dim_head, c.bias, residual),
        "ffn_norm": norm_specs(c.norm, d),
        "ffn": ffn.specs(c.activation, d, c.d_ff, c.bias, residual),
    }
    tree: dict[str, Any] = {
        "embed": {"tokens": Spec((v, d), ("vocab", "embed"), jax.nn.initializers.normal(0.02))},
        "layers": stack(layer, c.n_layers),
        "final_norm": norm_specs(c.norm, d),
    }
    if c.positions == "learned":
        tree["embed"]["positions"] = Spec((c.max_length, d), (None, "embed"), jax.nn.initializers.normal(0.01))
    if not c.tied:
        tree["head"] = {"kernel": Spec((d, v), ("embed", "vocab"), normal(d))}
    return tree


def published_count(c: DecoderConfig) -> int:
    """The number of parameters without the rows that pad the vocabulary."""
    padding = (c.padded_vocab - c.vocab_size) * c.d_model
    return count(specs(c)) - padding * (1 if c.tied else 2)


def make(c: DecoderConfig) -> Model:
    """The model of a config. Raises UserError when the config cannot be built."""
    validate(c)

    def apply(
        params, tokens, *, positions=None, segments=None, cache=None, embeds=None, context=None, types=None, rng=None, taps=()
    ):
        """tokens int [b, l] -> Output(hidden [b, l, d]). embeds [b, l, d] replace the token embeddings.

        segments [b, l]: attention stays inside a segment and positions restart (0 is padding). With a cache, positions go on
        from its length and segments only tell padding (0) from tokens. taps may name `layer_inputs`: aux has [n, b, l, d].
        """
        if context is not None or types is not None:
            raise ValueError("a decoder takes neither `context` nor `types`")
        x = params["embed"]["tokens"][tokens] if embeds is None else embeds
        b, length = x.shape[:2]
        segments = jnp.ones((b, length), jnp.int32) if segments is None else segments
        if cache is not None:
            positions = cache.length[:, None] + jnp.arange(length)[None, :] if positions is None else positions
            mask = jnp.arange(cache.k[0].shape[2])[None, None, :] <= positions[:, :, None]
        else:
            positions = segment_positions(segments) if positions is None else positions
            mask = attention.causal_mask(segments)
        if c.positions == "learned":
            x = x + params["embed"]["positions"][jnp.minimum(positions, c.max_length - 1)]
        x = shard(x.astype(c.dtype), "batch", None, None)
        caches = None if cache is None else list(zip(cache.k, cache.v, strict=True))
        x, caches, inputs = layer_stack.run(
            _block(c, positions, mask), params["layers"], x, caches, remat=c.remat, unroll=c.unroll, tap="layer_inputs" in taps
        )
        if cache is not None:
            k, v = zip(*caches, strict=True)
            cache = attention.KVCache(k, v, cache.length + jnp.sum(segments != 0, axis=1, dtype=jnp.int32))
        hidden = norm(params["final_norm"], x, c.norm_eps)
        return Output(hidden, cache, {"layer_inputs": inputs} if "layer_inputs" in taps else {})

    def head(params):
        kernel = params["embed"]["tokens"].T if c.tied else params["head"]["kernel"]
        return Head(kernel, vocab_size=c.vocab_size)

    def init_cache(batch, length, dtype=None):
        return attention.init_cache(c.n_layers, batch, length, c.kv_heads, c.dim_head, dtype or c.dtype)

    return Model(c, specs(c), apply, head, init_cache)


def _block(c: DecoderConfig, positions: jax.Array, mask: jax.Array):
    """One pre-norm layer: attention and feed-forward, each added to the residual stream."""
    theta = c.rope_theta if c.positions == "rope" else None

    def block(params, x, cache):
        h = norm(params["attention_norm"], x, c.norm_eps)
        y, cache = attention.apply(params["attention"], h, positions, mask, theta, cache)
        x = shard(x + y, "batch", None, None)
        x = x + ffn.apply(params["ffn"], norm(params["ffn_norm"], x, c.norm_eps))
        return shard(x, "batch", None, None), cache

    return block


def to_dict(c: DecoderConfig) -> dict[str, Any]:
    """The config as JSON-serialisable values, with its family."""
    return {"family": "decoder", **dataclasses.asdict(c)}
