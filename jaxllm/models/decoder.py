"""The decoder: every causal language model of the field's family tree, from one config and shared parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.core.sharding import shard
from jaxllm.core.spec import Spec, SpecTree, count, stack
from jaxllm.core.types import Head, Model, Output, Params
from jaxllm.models import attention, ffn, kernels, mla, moe
from jaxllm.models import stack as layer_stack
from jaxllm.models.decoder_config import DecoderConfig, validate
from jaxllm.models.layers import (
    Frequencies,
    dense,
    frequencies,
    norm,
    norm_specs,
    normal,
    padded,
    segment_positions,
    yarn_mscale,
)

__all__ = ["DecoderConfig", "make", "published_count", "specs", "validate"]


# ---- parameters


def specs(c: DecoderConfig) -> SpecTree:
    """The tree of parameters."""
    d = c.d_model
    tree: dict[str, Any] = {
        "embed": {"tokens": Spec((c.padded_vocab, d), ("vocab", "embed"), jax.nn.initializers.normal(0.02))},
        "layers": stack(layer_specs(c, sparse=c.moe is not None), c.n_layers - c.dense_layers),
        "final_norm": norm_specs(c.norm, d),
    }
    if c.dense_layers:
        tree["first_layers"] = stack(layer_specs(c, sparse=False), c.dense_layers)
    if c.positions == "learned":
        tree["embed"]["positions"] = Spec((c.max_length, d), (None, "embed"), jax.nn.initializers.normal(0.01))
    if not c.tied:
        tree["head"] = {"kernel": Spec((d, padded(c.outputs)), ("embed", "vocab"), normal(d))}
    if c.mtp_layers:
        tree["mtp"] = stack(mtp_specs(c), c.mtp_layers)
    return tree


def layer_specs(c: DecoderConfig, *, sparse: bool) -> SpecTree:
    """One layer's parameters; `sparse`: its feed-forward network is a mixture of experts."""
    residual = (2 * c.n_layers) ** -0.5  # GPT-2's scaling of what is added to the residual stream
    d, h = c.d_model, c.n_heads
    qkv_bias = c.bias if c.qkv_bias is None else c.qkv_bias
    tree = {
        "attention_norm": norm_specs(c.norm, d),
        "attention": attention.specs(
            d, h, c.kv_heads, c.dim_head, qkv_bias, residual, out_bias=c.bias if c.out_bias is None else c.out_bias,
            norm=c.norm if c.qk_norm else None,
        ) if c.mla is None else mla.specs(c.mla, d, h, residual),
        "ffn_norm": norm_specs(c.norm, d),
        "ffn": moe.specs(c.moe, c.activation, d, residual) if sparse else ffn.specs(c.activation, d, c.d_ff, c.bias, residual),
    }  # fmt: skip
    if c.sandwich_norms:
        tree |= {"post_attention_norm": norm_specs(c.norm, d), "post_ffn_norm": norm_specs(c.norm, d)}
    return tree


def mtp_specs(c: DecoderConfig) -> SpecTree:
    """One multi-token prediction module (DeepSeek-V3, arXiv 2412.19437): a layer on a hidden state merged with a later token."""
    d = c.d_model
    return {
        "embed_norm": norm_specs(c.norm, d),
        "hidden_norm": norm_specs(c.norm, d),
        "merge": {"kernel": Spec((2 * d, d), (None, "embed"), normal(2 * d))},
        "layer": layer_specs(c, sparse=c.moe is not None),
        "final_norm": norm_specs(c.norm, d),
    }


def published_count(c: DecoderConfig) -> int:
    """The number of parameters without the rows that pad the vocabulary."""
    padding = (c.padded_vocab - c.vocab_size) * c.d_model
    return count(specs(c)) - padding - (0 if c.tied else (padded(c.outputs) - c.outputs) * c.d_model)


# ---- the model


def make(c: DecoderConfig) -> Model:
    """The model of a config. Raises UserError when the config cannot be built."""
    validate(c)

    def apply(
        params, tokens, *, positions=None, segments=None, cache=None, embeds=None, context=None, types=None, rng=None, taps=()
    ):
        """tokens int [b, l] -> Output(hidden [b, l, d]). embeds [b, l, d] replace the token embeddings.

        segments [b, l]: attention stays inside a segment and positions restart (0 is padding). With a cache, positions go on
        from its length and segments only tell padding (0) from tokens. taps: `layer_inputs` puts [n, b, l, d] in aux, `mtp`
        [mtp_layers, b, l, d]: hidden states that predict 2, 3, ... tokens ahead. A mixture of experts puts its losses and
        loads there, under `router`, each stacked over layers.
        """
        if context is not None or types is not None:
            raise ValueError("a decoder takes neither `context` nor `types`")
        shape = (tokens if embeds is None else embeds).shape[:2]
        frame = frame_of(c, shape, segments, positions, cache)
        x = embed(c, params, tokens, embeds, frame)
        x, cache, aux = run(c, params, x, frame, cache, tap="layer_inputs" in taps)
        if "mtp" in taps:
            aux["mtp"], more = _mtp(c, params, tokens, x, frame)
            aux |= jax.tree.map(lambda a, b: jnp.concatenate([a, b]), {n: aux[n] for n in more}, more)
        return Output(norm(params["final_norm"], x, c.norm_eps), cache, aux)

    def head(params):
        kernel = params["embed"]["tokens"].T if c.tied else params["head"]["kernel"]
        return Head(kernel, softcap=c.final_softcap, vocab_size=c.outputs)

    def init_cache(batch, length, dtype=None):
        shapes = ((c.kv_heads, c.dim_head),) * 2 if c.mla is None else mla.cache_shapes(c.mla)
        return attention.init_cache(c.n_layers, batch, length, shapes, dtype or c.dtype)

    return Model(c, specs(c), apply, head, init_cache)


class Frame(NamedTuple):
    """What all layers of one call share: positions, used bool, both [b, l]; by attention window: masks, rotary frequencies."""

    positions: jax.Array
    used: jax.Array
    masks: dict[int, jax.Array]
    rotate: dict[int, Frequencies | None]


def frame_of(c: DecoderConfig, shape: tuple[int, int], segments: Any, positions: Any, cache: Any) -> Frame:
    """The Frame of a call on [b, l] tokens."""
    windows, given = set(c.windows or (0,)), segments
    segments = jnp.ones(shape, jnp.int32) if segments is None else segments
    if cache is not None:
        positions = cache.length[:, None] + jnp.arange(shape[1])[None, :] if positions is None else positions
        masks = {w: cache.mask(positions, w) for w in windows}
    else:
        positions = segment_positions(segments) if positions is None else positions
        widths = (c.dim_head,) * 2 if c.mla is None else (c.mla.nope_dim + c.mla.rope_dim, c.mla.value_dim)
        see = partial(kernels.see, c.attention, given, shape, widths=widths, dtype=c.dtype, softcap=c.attention_softcap)
        masks = {w: see(window=w) for w in windows}
    return Frame(positions, segments != 0, masks, {w: _rotation(c, w) for w in windows})


def _rotation(c: DecoderConfig, window: int) -> Frequencies | None:
    if c.positions != "rope":
        return None
    dim = c.dim_head if c.mla is None else c.mla.rope_dim
    if window and c.local_rope_theta is not None:
        return frequencies(dim, c.local_rope_theta)
    return frequencies(dim, c.rope_theta, c.rope_scaling)


def embed(c: DecoderConfig, params: Params, tokens: Any, embeds: Any, frame: Frame) -> jax.Array:
    """Token embeddings (or what replaces them) with learned positions where the model has them: [b, l, d]."""
    x = params["embed"]["tokens"][tokens] if embeds is None else embeds
    if c.embed_scale and embeds is None:
        x = x * jnp.asarray(c.d_model**0.5, c.dtype).astype(x.dtype)
    if c.positions == "learned":
        x = x + params["embed"]["positions"][jnp.minimum(frame.positions, c.max_length - 1)]
    return shard(x.astype(c.dtype), "batch", "residual", None)


def run(c: DecoderConfig, params: Params, x: jax.Array, frame: Frame, cache: Any, *, tap: bool = False):
    """All layers: (x before the final norm, the cache with the new positions, aux)."""
    caches = None if cache is None else list(cache.layers)
    new: list[Any] = []
    auxes: list[dict[str, Any]] = []
    start = 0
    for name, n in (("first_layers", c.dense_layers), ("layers", c.n_layers - c.dense_layers)):
        if n:
            part = None if caches is None else caches[start : start + n]
            x, part, aux = layer_stack.run(
                pattern(c, frame, start, n), params[name], x, part, remat=c.remat, unroll=c.unroll, tap=tap
            )
            new, start = new + (part or []), start + n
            auxes.append(aux)
    inputs = {"layer_inputs": jnp.concatenate([a.pop("layer_inputs") for a in auxes])} if tap else {}
    if cache is not None:
        cache = cache.replace(layers=tuple(new), length=cache.length + jnp.sum(frame.used, axis=1, dtype=jnp.int32))
    return x, cache, {**inputs, **auxes[-1]}


def pattern(c: DecoderConfig, frame: Frame, start: int, n: int) -> tuple[Callable, ...]:
    """The blocks that repeat over n layers from layer `start` on: one for each place in the pattern of windows."""
    windows = c.windows or (0,)
    period = 1 if len(set(windows)) == 1 else min(len(windows), n)
    return tuple(block(c, frame, windows[(start + i) % len(windows)]) for i in range(period))


def block(c: DecoderConfig, frame: Frame, window: int = 0) -> Callable:
    """One pre-norm layer: attention and feed-forward, each added to the residual stream."""
    mask, rotate = frame.masks[window], frame.rotate[window]

    def attend(params, h, cache):
        if c.mla is not None:
            scale = _mla_scale(c)
            return mla.apply(
                params, c.mla, h, mask, positions=frame.positions, rotate=rotate, cache=cache, eps=c.norm_eps, scale=scale
            )
        return attention.apply(
            params, h, mask, positions=frame.positions, rotate=rotate, cache=cache, eps=c.norm_eps, scale=c.attention_scale,
            softcap=c.attention_softcap,
        )  # fmt: skip

    def feed(params, h, cache):
        if c.moe is None or "router" not in params:
            return ffn.apply(params, h, c.activation), {}
        # a capacity is for training: at inference what is dropped would depend on the other rows
        dropless = c.moe if cache is None else replace(c.moe, capacity_factor=None)
        y, aux = moe.apply(params, dropless, c.activation, h, frame.used)
        return y, {"router": aux}

    def one(params, x, cache):
        y, cache = attend(params["attention"], norm(params["attention_norm"], x, c.norm_eps), cache)
        y = norm(params["post_attention_norm"], y, c.norm_eps) if c.sandwich_norms else y
        x = shard(x + y, "batch", "residual", None)
        y, aux = feed(params["ffn"], norm(params["ffn_norm"], x, c.norm_eps), cache)
        y = norm(params["post_ffn_norm"], y, c.norm_eps) if c.sandwich_norms else y
        return shard(x + y, "batch", "residual", None), cache, aux

    return one


def _mla_scale(c: DecoderConfig) -> float | None:
    """DeepSeek stretches attention's scale by the square of yarn's mscale."""
    if c.rope_scaling is None or not c.rope_scaling.mscale_all_dim:
        return c.attention_scale
    mscale = yarn_mscale(c.rope_scaling.factor, c.rope_scaling.mscale_all_dim)
    return (c.mla.nope_dim + c.mla.rope_dim) ** -0.5 * mscale**2


def _mtp(c: DecoderConfig, params: Params, tokens: jax.Array, x: jax.Array, frame: Frame) -> tuple[jax.Array, dict[str, Any]]:
    """Hidden states [m, b, l, d], and aux stacked to [m, ...].

    Number k at position t is made of number k - 1, normed, and token t + k, and predicts token t + k + 1.

    Where t + k is beyond the row the token is 0; the loss leaves such positions out.
    """
    out, auxes = [], []
    x = norm(params["final_norm"], x, c.norm_eps)
    for k in range(1, c.mtp_layers + 1):
        p = jax.tree.map(lambda a, k=k: a[k - 1], params["mtp"])
        later = embed(c, params, jnp.pad(tokens[:, k:], ((0, 0), (0, k))), None, frame)
        both = [norm(p["embed_norm"], later, c.norm_eps), norm(p["hidden_norm"], x, c.norm_eps)]
        merged = dense(jnp.concatenate(both, axis=-1), "bld,de->ble", p["merge"]["kernel"])
        x, _, aux = block(c, frame, min(frame.masks))(p["layer"], merged, None)
        x = norm(p["final_norm"], x, c.norm_eps)
        out.append(x)
        auxes.append(aux)
    return jnp.stack(out), jax.tree.map(lambda *a: jnp.stack(a), *auxes)
