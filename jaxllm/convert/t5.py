"""T5 v1.0, v1.1, FLAN-T5 and UL2, as transformers names them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from jaxllm.convert.names import Family, Leaf, choose, embedding, leaf, linear, need, norm, only
from jaxllm.models.encdec import EncDecConfig

ACTIVATIONS = {"relu": "relu", "gated-gelu": "geglu", "gated-silu": "swiglu"}
HEAD = "lm_head.weight"


def read(config: dict) -> EncDecConfig:
    """config.json -> ours. Whether the output is scaled and whether the head is the embedding are two questions: transformers 5
    writes tie_word_embeddings true for all, and scale_decoder_outputs for the first; `adjust` answers the second by the files.
    """
    only(config, is_encoder_decoder=(True,))
    layers = need(config, "num_layers")
    decoder_layers = config.get("num_decoder_layers") or layers
    tied = config.get("tie_word_embeddings") is not False
    scaled = config.get("scale_decoder_outputs")
    return EncDecConfig(
        vocab_size=need(config, "vocab_size"), max_length=config.get("n_positions") or 512, d_model=need(config, "d_model"),
        n_layers=layers, n_decoder_layers=None if decoder_layers == layers else decoder_layers,
        n_heads=need(config, "num_heads"), head_dim=need(config, "d_kv"), d_ff=need(config, "d_ff"),
        activation=choose(config, "feed_forward_proj", ACTIVATIONS, "relu"), tied=tied,
        scaled=None if scaled is None or scaled == tied else bool(scaled), start_id=config.get("decoder_start_token_id") or 0,
        buckets=need({"relative_attention_num_buckets": 32, **config}, "relative_attention_num_buckets"),
        max_distance=config.get("relative_attention_max_distance") or 128,
        norm_eps=need({"layer_norm_epsilon": 1e-6, **config}, "layer_norm_epsilon", float),
    )  # fmt: skip


def adjust(c: EncDecConfig, names: Iterable[str]) -> EncDecConfig:
    """Tied, unless the files have a head of its own."""
    tied = HEAD not in set(names)
    return dataclasses.replace(c, tied=tied, scaled=None if c.scales == tied else c.scales)


def write(c: EncDecConfig) -> dict[str, Any]:
    """The inverse of `read`, for transformers 5 and before."""
    return {
        "vocab_size": c.vocab_size, "n_positions": c.max_length, "d_model": c.d_model, "num_layers": c.n_layers,
        "num_decoder_layers": c.decoder_layers, "num_heads": c.n_heads, "d_kv": c.dim_head, "d_ff": c.d_ff,
        "feed_forward_proj": next(word for word, ours in ACTIVATIONS.items() if ours == c.activation),
        "tie_word_embeddings": c.tied, "scale_decoder_outputs": c.scales, "decoder_start_token_id": c.start_id,
        "relative_attention_num_buckets": c.buckets, "relative_attention_max_distance": c.max_distance,
        "layer_norm_epsilon": c.norm_eps, "is_encoder_decoder": True,
    }  # fmt: skip


def leaves(c: EncDecConfig) -> list[Leaf]:
    """The name table: decoder blocks have cross-attention between the other two parts."""
    head = [] if c.tied else linear("head", "lm_head")
    encoder = _side(c, "encoder/", "encoder", ("SelfAttention",))
    return [embedding("embed/tokens", "shared"), *encoder, *_side(c, "", "decoder", ("SelfAttention", "EncDecAttention")), *head]


def _side(c: EncDecConfig, ours: str, theirs: str, attentions: tuple[str, ...]) -> list[Leaf]:
    block, h = f"{theirs}.block.{{i}}.layer", (c.n_heads, c.dim_head)
    out = [
        leaf(f"{ours}relative/bias", f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        *norm(f"{ours}final_norm", f"{theirs}.final_layer_norm"),
    ]
    for number, (part, name) in enumerate(zip(("attention", "cross"), attentions, strict=False)):
        path = f"{ours}layers/{part}"
        out += norm(f"{path}_norm", f"{block}.{number}.layer_norm")
        out += [x for n in "qkv" for x in linear(f"{path}/{n}", f"{block}.{number}.{name}.{n}", out=h)]
        out += linear(f"{path}/o", f"{block}.{number}.{name}.o", inp=h)
    last = f"{block}.{len(attentions)}"
    gated = (("gate", "wi_0"), ("up", "wi_1"))
    for part, name in (*((("up", "wi"),) if c.activation == "relu" else gated), ("down", "wo")):
        out += linear(f"{ours}layers/ffn/{part}", f"{last}.DenseReluDense.{name}")
    return out + norm(f"{ours}layers/ffn_norm", f"{last}.layer_norm")


FAMILIES = (
    Family(
        "T5ForConditionalGeneration", "t5", EncDecConfig, read, write, leaves,
        # left over in the first published files: cross-attention never had a bias
        ignored=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
        # tied copies of the embedding, of which a file may hold any
        renames=((r"^(en|de)coder\.embed_tokens\.weight$", "shared.weight"),),
        adjust=adjust,
    ),
)  # fmt: skip
