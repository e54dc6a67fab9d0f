"""The encoder: BERT and RoBERTa (arXiv 1810.04805, 1907.11692) from one frozen config. No dropout, as everywhere here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.core.sharding import shard
from jaxllm.core.spec import Spec, SpecTree, count, stack
from jaxllm.core.types import Head, Model, Output, UserError
from jaxllm.models import attention, ffn, kernels
from jaxllm.models import stack as layer_stack
from jaxllm.models.layers import ACTIVATIONS, dense, norm, norm_specs, normal, padded, segment_positions, zeros

NORMAL = jax.nn.initializers.normal(0.02)


@dataclass(frozen=True)
class EncoderConfig:
    """An architecture. The defaults are BERT's parts; PRESETS has the published sizes."""

    vocab_size: int
    max_length: int = 512  # tokens that a sequence may have: the position table has position_offset rows more
    d_model: int = 128
    n_layers: int = 2
    n_heads: int = 4
    d_ff: int = 512
    n_types: int = 2  # token types: BERT 2, RoBERTa 1
    position_offset: int = 0  # the row of the first position: RoBERTa 2, its padding id + 1
    activation: str = "gelu_exact"
    norm_eps: float = 1e-12
    mlm: bool = True  # the masked-LM transform and head are there
    tied: bool = True  # the masked-LM head is the embedding transposed
    pooler: bool = False  # dense and tanh over the first position, for heads on whole sequences
    attention: str = "auto"  # the kernel: auto | plain | blocks | ring | splash | cudnn (see `kernels`)
    dtype: str = "float32"  # of activations; parameters stay float32
    remat: str = "none"  # of stack.POLICIES: none | dots | attention | full | offload
    unroll: bool = False

    @property
    def padded_vocab(self) -> int:
        return padded(self.vocab_size)


ALLOWED = {
    "activation": tuple(kind for kind, (_, gated) in ffn.KINDS.items() if not gated),
    "attention": ("auto", *kernels.KERNELS),
    "remat": tuple(layer_stack.POLICIES),
    "dtype": ("float32", "bfloat16", "float16"),
}


def validate(c: EncoderConfig) -> None:
    """Raises UserError on the first thing that cannot be built."""
    for name, allowed in ALLOWED.items():
        if (value := getattr(c, name)) not in allowed:
            raise UserError(f"model.{name}={value!r}: choose one of {', '.join(allowed)}")
    for name in ("vocab_size", "max_length", "d_model", "n_layers", "n_heads", "d_ff", "n_types"):
        if getattr(c, name) < 1:
            raise UserError(f"model.{name}={getattr(c, name)}: must be at least 1")
    if c.position_offset < 0:
        raise UserError(f"model.position_offset={c.position_offset}: must not be negative (RoBERTa has 2, BERT 0)")
    if c.d_model % c.n_heads:
        fits = [h for h in range(1, c.d_model + 1) if c.d_model % h == 0]
        near = min(fits, key=lambda h: abs(h - c.n_heads))
        raise UserError(f"model.n_heads={c.n_heads} does not divide model.d_model={c.d_model}: use n_heads={near}")


def specs(c: EncoderConfig) -> SpecTree:
    """The tree of parameters."""
    d, v, h = c.d_model, c.padded_vocab, c.n_heads
    square = {"kernel": Spec((d, d), ("embed", None), normal(d)), "bias": Spec((d,), ("embed",), zeros)}
    layer = {
        "attention": attention.specs(d, h, h, d // h, True, 1.0),
        "attention_norm": norm_specs("layernorm", d),
        "ffn": ffn.specs(c.activation, d, c.d_ff, True, 1.0),
        "ffn_norm": norm_specs("layernorm", d),
    }
    tree: dict[str, Any] = {
        "embed": {
            "tokens": Spec((v, d), ("vocab", "embed"), NORMAL),
            "positions": Spec((c.max_length + c.position_offset, d), (None, "embed"), NORMAL),
            "types": Spec((c.n_types, d), (None, "embed"), NORMAL),
            "norm": norm_specs("layernorm", d),
        },
        "layers": stack(layer, c.n_layers),
    }
    if c.pooler:
        tree["pooler"] = square
    if c.mlm:
        tree["transform"] = {"dense": square, "norm": norm_specs("layernorm", d)}
        tree["head"] = {"bias": Spec((v,), ("vocab",), zeros)}
        if not c.tied:
            tree["head"]["kernel"] = Spec((d, v), ("embed", "vocab"), normal(d))
    return tree


def published_count(c: EncoderConfig) -> int:
    """The number of parameters without the rows that pad the vocabulary."""
    padding = c.padded_vocab - c.vocab_size
    tables = 1 + (c.mlm and not c.tied)
    return count(specs(c)) - padding * (tables * c.d_model + c.mlm)


def make(c: EncoderConfig) -> Model:
    """The model of a config. Raises UserError when the config cannot be built."""
    validate(c)

    def head(params):
        if not c.mlm:
            raise ValueError("this encoder has no masked-LM head: its config says mlm=False")
        kernel = params["embed"]["tokens"].T if c.tied else params["head"]["kernel"]
        return Head(kernel, params["head"]["bias"], vocab_size=c.vocab_size)

    def init_cache(batch, length, dtype=None):
        raise ValueError("an encoder reads whole sequences: it has no cache")

    return Model(c, specs(c), partial(apply, c), head, init_cache)


def apply(
    c: EncoderConfig, params, tokens, *, positions=None, segments=None, cache=None, embeds=None, context=None, types=None,
    rng=None, taps=(),
) -> Output:  # fmt: skip
    """tokens int [b, l] -> Output(hidden [b, l, d], aux: states [b, l, d]). embeds [b, l, d] replace the token embeddings.

    hidden is what `head` reads: the states after the masked-LM transform, or the states where mlm is False. segments [b, l]:
    attention stays inside a segment and positions restart (0 is padding). types int [b, l]: token types (default 0).
    taps may name `layer_inputs`: aux has [n, b, l, d].
    """
    if cache is not None or context is not None:
        raise ValueError("an encoder takes neither `cache` nor `context`")
    x = params["embed"]["tokens"][tokens] if embeds is None else embeds
    widths = (c.d_model // c.n_heads,) * 2
    mask = kernels.see(c.attention, segments, x.shape[:2], causal=False, widths=widths, dtype=c.dtype)
    segments = jnp.ones(x.shape[:2], jnp.int32) if segments is None else segments
    positions = segment_positions(segments) if positions is None else positions
    x = x + params["embed"]["positions"][c.position_offset + jnp.minimum(positions, c.max_length - 1)]
    x = x + params["embed"]["types"][jnp.zeros_like(segments) if types is None else types]
    x = norm(params["embed"]["norm"], shard(x.astype(c.dtype), "batch", "residual", None), c.norm_eps)
    x, _, aux = layer_stack.run(
        _block(c, mask), params["layers"], x, None,
        remat=c.remat, unroll=c.unroll, tap="layer_inputs" in taps,
    )  # fmt: skip
    return Output(_transform(c, params["transform"], x) if c.mlm else x, None, {**aux, "states": x})


def _block(c: EncoderConfig, mask: Any):
    """One post-norm layer: each sum with the residual stream is normalised."""

    def block(params, x, cache):
        y, _ = attention.apply(params["attention"], x, mask)
        x = shard(norm(params["attention_norm"], x + y, c.norm_eps), "batch", "residual", None)
        x = norm(params["ffn_norm"], x + ffn.apply(params["ffn"], x, c.activation), c.norm_eps)
        return shard(x, "batch", "residual", None), cache, {}

    return block


def _transform(c: EncoderConfig, params: Any, x: jax.Array) -> jax.Array:
    """norm(act(dense(x))): what BERT puts between its states and the vocabulary."""
    y = dense(x, "bld,de->ble", params["dense"]["kernel"], params["dense"]["bias"])
    return norm(params["norm"], ACTIVATIONS[ffn.KINDS[c.activation][0]](y), c.norm_eps)


BERT_BASE = EncoderConfig(vocab_size=30_522, d_model=768, n_layers=12, n_heads=12, d_ff=3072, pooler=True)
ROBERTA_BASE = replace(BERT_BASE, vocab_size=50_265, n_types=1, position_offset=2, norm_eps=1e-5, pooler=False)
_large = partial(replace, d_model=1024, n_layers=24, n_heads=16, d_ff=4096)

PRESETS: dict[str, EncoderConfig] = {
    "tiny": EncoderConfig(vocab_size=1024, max_length=128, d_model=96, n_layers=2, n_heads=3, d_ff=256, unroll=True),
    "bert-base": BERT_BASE,
    "bert-large": _large(BERT_BASE),
    "roberta-base": ROBERTA_BASE,
    "roberta-large": _large(ROBERTA_BASE),
}
