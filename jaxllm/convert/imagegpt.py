"""ImageGPT, as transformers names it: GPT-2's layers with RMS norms, over palette colours and a start token."""

from __future__ import annotations

from jaxllm.convert.names import Family, Leaf, choose, conv1d, embedding, fused, leaf, linear, need, norm, only
from jaxllm.core.types import UserError
from jaxllm.models.decoder_config import DecoderConfig

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu_new": "gelu", "gelu": "gelu_exact", "relu": "relu"}
WORDS = {ours: theirs for theirs, ours in ACTIVATIONS.items()}


def imagegpt(config: dict) -> DecoderConfig:
    """The start token, the last id, is read and never predicted."""
    only(
        config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False,
        tie_word_embeddings=False,
    )  # fmt: skip
    d, vocab_size = need(config, "n_embd"), need(config, "vocab_size")
    return DecoderConfig(
        vocab_size=vocab_size, n_outputs=vocab_size - 1, max_length=need(config, "n_positions"), d_model=d,
        n_layers=need(config, "n_layer"), n_heads=need(config, "n_head"), d_ff=config.get("n_inner") or 4 * d,
        positions="learned", norm="rmsnorm", bias=True, tied=False,
        activation=choose(config, "activation_function", ACTIVATIONS, "quick_gelu"),
        norm_eps=need(config, "layer_norm_epsilon", float),
    )  # fmt: skip


def imagegpt_config(c: DecoderConfig) -> dict:
    """The inverse of `imagegpt`."""
    if c.activation not in WORDS:
        raise UserError(f"activation {c.activation!r} is none of {', '.join(WORDS)}")
    return {
        "vocab_size": c.vocab_size, "n_positions": c.max_length, "n_embd": c.d_model, "n_layer": c.n_layers, "n_head": c.n_heads,
        "n_inner": c.d_ff, "layer_norm_epsilon": c.norm_eps, "activation_function": WORDS[c.activation],
        "tie_word_embeddings": False,
    }  # fmt: skip


def leaves(c: DecoderConfig) -> list[Leaf]:
    """Conv1D layers, with queries, keys and values in one; norms without bias; a head of one row less than the embedding."""
    h, theirs = (c.n_heads, c.dim_head), "transformer.h.{i}"
    return [
        embedding("embed/tokens", "transformer.wte"),
        leaf("embed/positions", "transformer.wpe.weight"),
        *norm("final_norm", "transformer.ln_f"),
        *norm("layers/attention_norm", f"{theirs}.ln_1"),
        *fused(tuple(f"layers/attention/{n}" for n in "qkv"), f"{theirs}.attn.c_attn", outs=(h,) * 3, transpose=False, bias=True),
        *conv1d("layers/attention/o", f"{theirs}.attn.c_proj", inp=h),
        *norm("layers/ffn_norm", f"{theirs}.ln_2"),
        *conv1d("layers/ffn/up", f"{theirs}.mlp.c_fc"),
        *conv1d("layers/ffn/down", f"{theirs}.mlp.c_proj"),
        *linear("head", "lm_head", rows=c.outputs),
    ]


FAMILIES = (
    Family(
        "ImageGPTForCausalImageModeling", "imagegpt", DecoderConfig, imagegpt, imagegpt_config, leaves,
        ignored=r"transformer\.h\.\d+\.attn\.(masked_)?bias", renames=((r"^(?=wte\.|wpe\.|h\.|ln_f\.)", "transformer."),),
    ),
)  # fmt: skip
