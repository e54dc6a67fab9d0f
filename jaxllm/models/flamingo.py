"""A Flamingo-like model (arXiv 2204.14198): a frozen decoder that looks at images through gated cross-attention.

Images become patches (a small vision encoder, or features that come with the batch), a resampler makes a few latents of the
patches, and before every k-th layer of the decoder text attends to the latents of the last image before it. What these layers
add is multiplied by tanh(gate) with a gate of 0 at the start: an untrained model is exactly its decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jaxllm.core.sharding import shard
from jaxllm.core.spec import Spec, SpecTree, count, stack
from jaxllm.core.types import Model, Output, Params, UserError
from jaxllm.models import attention, decoder, ffn
from jaxllm.models import stack as layer_stack
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.layers import norm, norm_specs, normal, zeros

BRIDGE = r"/(resampler|cross_layers)/"  # what is trained while the decoder and the vision encoder are frozen


@dataclass(frozen=True)
class VisionConfig:
    """An encoder of palette images: patches of patch x patch pixels, full attention between them."""

    colours: int = 8
    size: int = 12  # pixels of a side
    patch: int = 3
    n_layers: int = 2
    n_heads: int = 4

    @property
    def patches(self) -> int:
        return (self.size // self.patch) ** 2


@dataclass(frozen=True)
class FlamingoConfig:
    """decoder: the language model's config. vision None: features [b, i, n_patches, d_vision] come with the batch."""

    decoder: DecoderConfig
    vision: VisionConfig | None = None
    d_vision: int = 64
    n_patches: int = 16
    n_latents: int = 8  # an image is so many vectors to the decoder
    resampler_layers: int = 1
    every: int = 1  # a cross-attention layer before every k-th layer of the decoder
    n_heads: int = 4  # of the resampler and of cross-attention
    norm_eps: float = 1e-5

    @property
    def vocab_size(self) -> int:
        return self.decoder.vocab_size

    @property
    def max_length(self) -> int:
        return self.decoder.max_length

    @property
    def d_model(self) -> int:
        return self.decoder.d_model

    @property
    def cross_layers(self) -> int:
        return -(-self.decoder.n_layers // self.every)


PRESETS: dict[str, FlamingoConfig] = {
    "tiny": FlamingoConfig(
        DecoderConfig(vocab_size=128, max_length=64, d_model=64, n_layers=2, n_heads=4, d_ff=128, unroll=True), VisionConfig()
    ),
    # tables 4 and 5 of the paper; its vision encoder, an NFNet-F6 that is no part of this model, gives 100 features of 1536
    "flamingo-3b": FlamingoConfig(
        DecoderConfig(vocab_size=32_000, max_length=2048, d_model=2048, n_layers=24, n_heads=16, d_ff=8192, activation="gelu"),
        d_vision=1536, n_patches=100, n_latents=64, resampler_layers=6, every=1, n_heads=16,
    ),
}  # fmt: skip


class Seen(NamedTuple):
    """What text attends to. kv: for each cross-attention layer keys and values [b, h, i * r, k]; starts, segments int [b, i]."""

    kv: tuple[tuple[jax.Array, jax.Array], ...]
    starts: jax.Array
    segments: jax.Array


@struct.dataclass
class Cache:
    """layers, length: the decoder's (attention.KVCache). seen: the context that `apply` was given; later calls need none."""

    layers: tuple[tuple[jax.Array, ...], ...]
    length: jax.Array
    seen: Seen | None = None

    def mask(self, positions: jax.Array, window: int = 0) -> jax.Array:
        """As a KVCache's."""
        return attention.cache_mask(positions, self.layers[0][0].shape[2], window)


def validate(c: FlamingoConfig) -> None:
    """Raises UserError on the first thing that cannot be built."""
    decoder.validate(c.decoder)
    for name in ("d_vision", "n_patches", "n_latents", "resampler_layers", "every", "n_heads"):
        if getattr(c, name) < 1:
            raise UserError(f"model.{name}={getattr(c, name)}: must be at least 1")
    for name, width in (("d_vision", c.d_vision), ("decoder.d_model", c.d_model)):
        if width % c.n_heads:
            raise UserError(f"model.n_heads={c.n_heads} does not divide model.{name}={width}")
    if c.decoder.dense_layers or c.decoder.moe or c.decoder.mtp_layers:
        raise UserError("model.decoder: Flamingo needs layers of one kind: no moe, dense_layers or mtp_layers")
    if (v := c.vision) is not None:
        if v.size % v.patch or v.patches != c.n_patches:
            raise UserError(
                f"model.vision.size={v.size} in patches of {v.patch} x {v.patch}: must divide, and into n_patches={c.n_patches}"
            )
        if c.d_vision % v.n_heads:
            raise UserError(f"model.vision.n_heads={v.n_heads} does not divide model.d_vision={c.d_vision}")


# ---- parameters


def specs(c: FlamingoConfig) -> SpecTree:
    """The decoder's own tree, and beside it `vision`, `resampler` and `cross_layers`: a decoder's weights go in as they are."""
    d, k = c.d_vision, c.d_vision // c.n_heads
    normal_norm = norm_specs("layernorm", d)
    latents = {
        "source_norm": normal_norm, "norm": normal_norm, "attention": attention.specs(d, c.n_heads, c.n_heads, k, False, 1.0),
        "ffn_norm": normal_norm, "ffn": ffn.specs("gelu", d, 4 * d, True, 1.0),
    }  # fmt: skip
    gate = Spec((), (), zeros)
    width = c.d_model // c.n_heads
    cross = {
        "norm": norm_specs("layernorm", c.d_model),
        "attention": attention.specs(c.d_model, c.n_heads, c.n_heads, width, False, 1.0, source=d),
        "attention_gate": gate,
        "ffn_norm": norm_specs("layernorm", c.d_model),
        "ffn": ffn.specs("gelu", c.d_model, 4 * c.d_model, True, 1.0),
        "ffn_gate": gate,
    }
    tree = {
        **decoder.specs(c.decoder),
        "resampler": {
            "positions": Spec((c.n_patches, d), (None, "embed"), normal(d)),
            "latents": Spec((c.n_latents, d), (None, "embed"), normal(d, d**0.5)),
            "layers": stack(latents, c.resampler_layers),
            "norm": normal_norm,
        },
        "cross_layers": stack(cross, c.cross_layers),
    }
    return tree if c.vision is None else {**tree, "vision": _vision_specs(c.vision, d)}


def _vision_specs(v: VisionConfig, d: int) -> SpecTree:
    pixels = v.patch * v.patch
    layer = {
        "attention_norm": norm_specs("layernorm", d),
        "attention": attention.specs(d, v.n_heads, v.n_heads, d // v.n_heads, True, (2 * v.n_layers) ** -0.5),
        "ffn_norm": norm_specs("layernorm", d),
        "ffn": ffn.specs("gelu", d, 4 * d, True, (2 * v.n_layers) ** -0.5),
    }
    return {
        "patches": {"kernel": Spec((pixels, v.colours, d), (None, None, "embed"), normal(pixels))},
        "positions": Spec((v.patches, d), (None, "embed"), normal(d)),
        "layers": stack(layer, v.n_layers),
        "norm": norm_specs("layernorm", d),
    }


def published_count(c: FlamingoConfig) -> int:
    """The number of parameters without the rows that pad the vocabulary."""
    return count(specs(c)) - count(decoder.specs(c.decoder)) + decoder.published_count(c.decoder)


# ---- from images to what text attends to


def see(c: FlamingoConfig, params: Params, pixels: jax.Array) -> jax.Array:
    """The vision encoder: palette images int [n, h, w] -> features [n, p, d_vision]."""
    v, p = c.vision, params["vision"]
    n, side = pixels.shape[0], v.size // v.patch
    patches = pixels.reshape(n, side, v.patch, side, v.patch).transpose(0, 1, 3, 2, 4).reshape(n, side * side, -1)
    hot = jax.nn.one_hot(patches, v.colours, dtype=c.decoder.dtype)
    x = jnp.einsum("npqc,qcd->npd", hot, p["patches"]["kernel"].astype(hot.dtype)) + p["positions"].astype(hot.dtype)[None]
    mask = jnp.ones((n, x.shape[1], x.shape[1]), bool)

    def block(params, x, cache):
        y, _ = attention.apply(params["attention"], norm(params["attention_norm"], x, c.norm_eps), mask)
        x = x + y
        return x + ffn.apply(params["ffn"], norm(params["ffn_norm"], x, c.norm_eps), "gelu"), cache, {}

    x, _, _ = layer_stack.run(block, p["layers"], shard(x, "batch", "residual", None), unroll=c.decoder.unroll)
    return norm(p["norm"], x, c.norm_eps)


def resample(c: FlamingoConfig, params: Params, features: jax.Array) -> jax.Array:
    """The Perceiver resampler (section 3.1.1): features [n, p, d] -> latents [n, r, d].

    Learned queries attend to the patches and to themselves, keys and values of both in one attention.
    """
    p, eps = params["resampler"], c.norm_eps
    source = features.astype(c.decoder.dtype) + p["positions"].astype(c.decoder.dtype)[None]
    x = jnp.broadcast_to(p["latents"].astype(source.dtype)[None], (source.shape[0], *p["latents"].shape))
    mask = jnp.ones((x.shape[0], x.shape[1], x.shape[1] + source.shape[1]), bool)

    def block(params, x, cache):
        h = norm(params["norm"], x, eps)
        both = jnp.concatenate([norm(params["source_norm"], source, eps), h], axis=1)
        x = x + attention.cross(params["attention"], h, attention.keys_values(params["attention"], both), mask)
        return x + ffn.apply(params["ffn"], norm(params["ffn_norm"], x, eps), "gelu"), cache, {}

    x, _, _ = layer_stack.run(block, p["layers"], x, unroll=c.decoder.unroll)
    return norm(p["norm"], x, eps)


def _layer(layers: Any, n: int | slice) -> Any:
    """One layer's parameters, or those of a slice of layers, stacked or in a tuple as they came."""
    return layers[n] if isinstance(layers, tuple) else jax.tree.map(lambda a: a[n], layers)


def _encode(c: FlamingoConfig, params: Params, inputs: Any) -> Seen:
    images = inputs["features" if c.vision is None else "pixels"]
    b, i = images.shape[:2]
    flat = images.reshape(b * i, *images.shape[2:])
    features = flat if c.vision is None else see(c, params, flat)
    latents = resample(c, params, features).reshape(b, i * c.n_latents, c.d_vision)
    layers = [_layer(params["cross_layers"], n)["attention"] for n in range(c.cross_layers)]
    return Seen(tuple(attention.keys_values(p, latents) for p in layers), inputs["starts"], inputs["segments"])


def visible(seen: Seen, index: jax.Array, segments: jax.Array | None) -> jax.Array:
    """bool [b, l, i]: the last image that starts at or before each index [b, l], of its own segment where segments are given."""
    there = (seen.segments != 0)[:, None, :] & (seen.starts[:, None, :] <= index[:, :, None])
    if segments is not None:
        there = there & (seen.segments[:, None, :] == segments[:, :, None])
    return there & (jnp.flip(jnp.cumsum(jnp.flip(there, -1), axis=-1), -1) == 1)


# ---- the model


def make(c: FlamingoConfig) -> Model:
    """The model of a config. Raises UserError when the config cannot be built."""
    validate(c)
    text = decoder.make(c.decoder)

    def encode(params, inputs):
        """{pixels int [b, i, h, w] (or features [b, i, p, d]), starts int [b, i], segments int [b, i]} -> context.

        Image j of a row is seen by the tokens from index starts[j] on, up to the next image, in its segment of the packed row;
        images stand in the order of their starts, and segment 0 is no image.
        """
        return _encode(c, params, inputs)

    def apply(
        params, tokens, *, positions=None, segments=None, cache=None, embeds=None, context=None, types=None, rng=None, taps=()
    ):
        """As the decoder's apply, with context from `encode`; without it no text sees an image, unless the cache has one."""
        if types is not None:
            raise ValueError("Flamingo does not take `types`")
        shape = (tokens if embeds is None else embeds).shape[:2]
        frame = decoder.frame_of(c.decoder, shape, segments, positions, cache)
        x = decoder.embed(c.decoder, params, tokens, embeds, frame)
        context = cache.seen if context is None and cache is not None else context
        looks = None if context is None else _looks(c, context, shape, segments, cache)
        x, layers, inputs = _run(c, params, x, frame, cache, context, looks, "layer_inputs" in taps)
        if cache is not None:
            cache = Cache(layers, cache.length + jnp.sum(frame.used, axis=1, dtype=jnp.int32), context)
        return Output(norm(params["final_norm"], x, c.decoder.norm_eps), cache, inputs)

    def init_cache(batch, length, dtype=None):
        empty = text.init_cache(batch, length, dtype)
        return Cache(empty.layers, empty.length)

    return Model(c, specs(c), apply, text.head, init_cache, encode)


def _looks(c: FlamingoConfig, context: Seen, shape: tuple[int, int], segments: Any, cache: Any) -> jax.Array:
    """bool [b, l, i * r]: which latents a token attends to."""
    index = jnp.broadcast_to(jnp.arange(shape[1])[None, :], shape)
    if cache is None:
        seen = visible(context, index, jnp.ones(shape, jnp.int32) if segments is None else segments)
    else:  # a cache holds one text a row
        seen = visible(context, cache.length[:, None] + index, None)
    return jnp.repeat(seen, c.n_latents, axis=-1)


def _run(c: FlamingoConfig, params: Params, x: jax.Array, frame: Any, cache: Any, context: Any, looks: Any, tap: bool):
    """Groups of `every` decoder layers, a cross-attention layer before each: (x, caches, {layer_inputs} or {})."""
    n, new, inputs = c.decoder.n_layers, [], []
    for number, start in enumerate(range(0, n, c.every)):
        size = min(c.every, n - start)
        kv = None if context is None else context.kv[number]
        x = _remat(c, _cross)(c, _layer(params["cross_layers"], number), x, kv, looks)
        part = slice(start, start + size)
        layers = _layer(params["layers"], part)
        x, caches, aux = layer_stack.run(
            decoder.pattern(c.decoder, frame, start, size), layers, x, None if cache is None else list(cache.layers[part]),
            remat=c.decoder.remat, unroll=c.decoder.unroll, tap=tap,
        )  # fmt: skip
        new += caches or []
        inputs += [aux["layer_inputs"]] if tap else []
    return x, tuple(new), {"layer_inputs": jnp.concatenate(inputs)} if tap else {}


def _remat(c: FlamingoConfig, cross: Any) -> Any:
    policy = layer_stack.POLICIES[c.decoder.remat]
    return cross if policy is None else jax.checkpoint(cross, policy=policy, static_argnums=0)


def _cross(c: FlamingoConfig, params: Any, x: jax.Array, kv: Any, looks: Any) -> jax.Array:
    """x + tanh(a) attention(x, image), then + tanh(b) ffn, a = b = 0 at the start (figure 4 of the paper)."""
    gate = lambda name: jnp.tanh(params[name].astype(jnp.float32)).astype(x.dtype)  # noqa: E731
    if kv is not None:
        y = attention.cross(params["attention"], norm(params["norm"], x, c.norm_eps), kv, looks)
        # a token before the first image would attend to all of them evenly
        x = x + gate("attention_gate") * jnp.where(looks.any(axis=-1, keepdims=True), y, 0)
    y = ffn.apply(params["ffn"], norm(params["ffn_norm"], x, c.norm_eps), "gelu")
    return shard(x + gate("ffn_gate") * y, "batch", "residual", None)
