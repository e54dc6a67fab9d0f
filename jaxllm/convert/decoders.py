"""Decoders: GPT-2, Llama, Mistral, Qwen 2 and 3, Gemma 1, 2 and 3, as transformers names them."""

from __future__ import annotations

from typing import Any

from jaxllm.convert.names import Family, Leaf, choose, conv1d, embedding, fused, leaf, linear, need, norm, only
from jaxllm.core.types import UserError
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.layers import RopeScaling

GATED = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu"}
UNGATED = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact", "relu": "relu", "quick_gelu": "quick_gelu"}
IGNORED = r"lm_head\.weight|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
SLIDING, FULL = "sliding_attention", "full_attention"


def _back(table: dict[str, str], value: str) -> str:
    """The first published word for ours. UserError when there is none."""
    words = [word for word, ours in table.items() if ours == value]
    if not words:
        raise UserError(f"activation {value!r} is none of {', '.join(table.values())}")
    return words[0]


# ---- rotary positions


def read_rope(config: dict, default: float = 10_000.0, layer_type: str | None = None) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    given = config.get("rope_parameters") or {}
    given = (given.get(layer_type) or {}) if layer_type in given else given
    values = {**(config.get("rope_scaling") or {}), **given}
    theta = float(values.get("rope_theta") or config.get("rope_theta") or default)
    part = values.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if part not in (None, 1, 1.0):
        raise UserError(f"config.json: partial_rotary_factor={part} is not supported: all of a head's width is rotated")
    return theta, read_scaling(values, config)


def read_scaling(values: dict, config: dict) -> RopeScaling | None:
    """The scaling of a dictionary of rotary parameters. UserError on a type that is not known."""
    kind = values.get("rope_type", values.get("type", "default"))
    length = values.get("original_max_position_embeddings") or config.get("max_position_embeddings") or 0
    if kind in ("default", None):
        return None
    if kind not in ("linear", "llama3", "yarn"):
        raise UserError(f"config.json: rope_type={kind!r} is not supported: default, linear, llama3 and yarn are")
    factor = values.get("factor") or (config["max_position_embeddings"] / length if kind == "yarn" else None)
    if not isinstance(factor, (int, float)):
        raise UserError(f"config.json: rope_type={kind!r} without a factor")
    if kind == "linear":
        return RopeScaling(kind, float(factor))
    if kind == "llama3":
        low, high = need(values, "low_freq_factor", float), need(values, "high_freq_factor", float)
        return RopeScaling(kind, float(factor), length, low_factor=low, high_factor=high)
    return RopeScaling(
        kind, float(factor), length,
        beta_fast=float(values.get("beta_fast") or 32), beta_slow=float(values.get("beta_slow") or 1),
        mscale=float(values.get("mscale") or 0), mscale_all_dim=float(values.get("mscale_all_dim") or 0),
        attention_factor=values.get("attention_factor"), truncate=bool(values.get("truncate", True)),
    )  # fmt: skip


def write_rope(theta: float, scaling: RopeScaling | None) -> dict:
    """Both spellings: transformers 5 reads the first, older versions the others."""
    scaled = write_scaling(scaling)
    return {
        "rope_parameters": {"rope_theta": theta, **(scaled or {"rope_type": "default"})},
        "rope_theta": theta,
        "rope_scaling": scaled,
    }


def write_scaling(s: RopeScaling | None) -> dict | None:
    """A scaling as transformers spells it; None for none."""
    if s is None:
        return None
    more = {"original_max_position_embeddings": s.original_length} if s.kind != "linear" else {}
    if s.kind == "llama3":
        more |= {"low_freq_factor": s.low_factor, "high_freq_factor": s.high_factor}
    if s.kind == "yarn":
        more |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow, "truncate": s.truncate}
        given = {"mscale": s.mscale, "mscale_all_dim": s.mscale_all_dim, "attention_factor": s.attention_factor}
        more |= {k: v for k, v in given.items() if v}
    return {"rope_type": s.kind, "factor": s.factor, **more}


# ---- windows


def read_windows(config: dict, types: list[str]) -> tuple[int, ...]:
    """The shortest pattern of windows that repeats over the layers, from the type of each; () where all see everything."""
    types = config.get("layer_types") or types
    if unknown := sorted(set(types) - {SLIDING, FULL}):
        raise UserError(f"config.json: layer type {unknown[0]!r} is not supported: {SLIDING} and {FULL} are")
    if SLIDING not in types:
        return ()
    window = need(config, "sliding_window")
    windows = [window if kind == SLIDING else 0 for kind in types]
    period = next(p for p in range(1, len(windows) + 1) if all(w == windows[i % p] for i, w in enumerate(windows)))
    return tuple(windows[:period])


def write_windows(c: DecoderConfig) -> dict:
    """sliding_window and layer_types. UserError when layers have different windows."""
    sizes = {w for w in c.windows if w}
    if len(sizes) > 1:
        raise UserError(f"windows {sorted(sizes)}: only one size is published")
    windows = [c.windows[i % len(c.windows)] if c.windows else 0 for i in range(c.n_layers)]
    return {"sliding_window": next(iter(sizes), None), "layer_types": [SLIDING if w else FULL for w in windows]}


# ---- what Llama and its descendants share


def read_base(config: dict, *, tied: bool = False, head_dim: int | None = None) -> dict[str, Any]:
    """The settings that all of them have; tied and head_dim: what a missing key means."""
    only(config, pretraining_tp=(1, None))
    heads = need(config, "num_attention_heads")
    d = need(config, "hidden_size")
    return {
        "vocab_size": need(config, "vocab_size"), "max_length": need(config, "max_position_embeddings"), "d_model": d,
        "n_layers": need(config, "num_hidden_layers"), "n_heads": heads,
        "n_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or head_dim or d // heads, "d_ff": need(config, "intermediate_size"),
        "norm_eps": need(config, "rms_norm_eps", float), "tied": bool(config.get("tie_word_embeddings", tied)),
    }  # fmt: skip


def write_base(c: DecoderConfig) -> dict[str, Any]:
    """The inverse, with the rotary positions."""
    return {
        "vocab_size": c.vocab_size, "max_position_embeddings": c.max_length, "hidden_size": c.d_model,
        "num_hidden_layers": c.n_layers, "num_attention_heads": c.n_heads, "num_key_value_heads": c.kv_heads,
        "head_dim": c.dim_head, "intermediate_size": c.d_ff, "rms_norm_eps": c.norm_eps, "tie_word_embeddings": c.tied,
        **write_rope(c.rope_theta, c.rope_scaling),
    }  # fmt: skip


def ends(c: DecoderConfig) -> list[Leaf]:
    """Embedding, last norm and, where it is not the embedding, the head."""
    out = [embedding("embed/tokens", "model.embed_tokens"), *_norm(c, "final_norm", "model.norm")]
    return out if c.tied else [*out, *linear("head", "lm_head", rows=c.outputs)]


def attention(c: DecoderConfig, ours: str = "layers", start: int = 0) -> list[Leaf]:
    """One stack's attention, with the norm before it."""
    theirs, h, g = "model.layers.{i}", (c.n_heads, c.dim_head), (c.kv_heads, c.dim_head)
    qkv = c.bias if c.qkv_bias is None else c.qkv_bias
    out = [
        *_norm(c, f"{ours}/attention_norm", f"{theirs}.input_layernorm", start),
        *linear(f"{ours}/attention/q", f"{theirs}.self_attn.q_proj", out=h, bias=qkv, start=start),
        *linear(f"{ours}/attention/k", f"{theirs}.self_attn.k_proj", out=g, bias=qkv, start=start),
        *linear(f"{ours}/attention/v", f"{theirs}.self_attn.v_proj", out=g, bias=qkv, start=start),
    ]
    o_bias = c.bias if c.out_bias is None else c.out_bias
    o = linear(f"{ours}/attention/o", f"{theirs}.self_attn.o_proj", inp=h, bias=o_bias, start=start)
    if c.qk_norm:
        out += _norm(c, f"{ours}/attention/q_norm", f"{theirs}.self_attn.q_norm", start)
        out += _norm(c, f"{ours}/attention/k_norm", f"{theirs}.self_attn.k_norm", start)
    return out + o


def gated(ours: str, theirs: str, *, bias: bool = False, start: int = 0) -> list[Leaf]:
    """gate, up and down of a feed-forward network."""
    names = (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj"))
    return [x for a, b in names for x in linear(f"{ours}/{a}", f"{theirs}.{b}", bias=bias, start=start)]


def _norm(c: DecoderConfig, ours: str, theirs: str, start: int = 0) -> list[Leaf]:
    return norm(ours, theirs, offset=c.norm == "rmsnorm_offset", start=start)


def leaves(c: DecoderConfig) -> list[Leaf]:
    """The table of Llama, Mistral, Qwen and Gemma."""
    theirs = "model.layers.{i}"
    out = [*ends(c), *attention(c), *gated("layers/ffn", f"{theirs}.mlp", bias=c.bias)]
    if not c.sandwich_norms:
        return out + _norm(c, "layers/ffn_norm", f"{theirs}.post_attention_layernorm")
    return [
        *out,
        *_norm(c, "layers/post_attention_norm", f"{theirs}.post_attention_layernorm"),
        *_norm(c, "layers/ffn_norm", f"{theirs}.pre_feedforward_layernorm"),
        *_norm(c, "layers/post_ffn_norm", f"{theirs}.post_feedforward_layernorm"),
    ]


# ---- one family after another


def gpt2(config: dict) -> DecoderConfig:
    """GPT-2."""
    only(config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    d = need(config, "n_embd")
    return DecoderConfig(
        vocab_size=need(config, "vocab_size"), max_length=need(config, "n_positions"), d_model=d,
        n_layers=need(config, "n_layer"), n_heads=need(config, "n_head"), d_ff=config.get("n_inner") or 4 * d,
        positions="learned", norm="layernorm", activation=choose(config, "activation_function", UNGATED, "gelu_new"),
        bias=True, tied=bool(config.get("tie_word_embeddings", True)), norm_eps=need(config, "layer_norm_epsilon", float),
    )  # fmt: skip


def gpt2_config(c: DecoderConfig) -> dict:
    """The inverse of `gpt2`."""
    return {
        "vocab_size": c.vocab_size, "n_positions": c.max_length, "n_ctx": c.max_length, "n_embd": c.d_model,
        "n_layer": c.n_layers, "n_head": c.n_heads, "n_inner": c.d_ff, "layer_norm_epsilon": c.norm_eps,
        "activation_function": _back(UNGATED, c.activation), "tie_word_embeddings": c.tied,
    }  # fmt: skip


def gpt2_leaves(c: DecoderConfig) -> list[Leaf]:
    """Conv1D layers, with queries, keys and values in one."""
    h, theirs = (c.n_heads, c.dim_head), "transformer.h.{i}"
    out = [
        embedding("embed/tokens", "transformer.wte"),
        leaf("embed/positions", "transformer.wpe.weight"),
        *norm("final_norm", "transformer.ln_f", bias=True),
        *norm("layers/attention_norm", f"{theirs}.ln_1", bias=True),
        *fused(tuple(f"layers/attention/{n}" for n in "qkv"), f"{theirs}.attn.c_attn", outs=(h,) * 3, transpose=False, bias=True),
        *conv1d("layers/attention/o", f"{theirs}.attn.c_proj", inp=h),
        *norm("layers/ffn_norm", f"{theirs}.ln_2", bias=True),
        *conv1d("layers/ffn/up", f"{theirs}.mlp.c_fc"),
        *conv1d("layers/ffn/down", f"{theirs}.mlp.c_proj"),
    ]
    return out if c.tied else [*out, *linear("head", "lm_head", rows=c.outputs)]


def llama(config: dict) -> DecoderConfig:
    """Llama 1 to 3."""
    theta, scaling = read_rope(config)
    attention_bias = bool(config.get("attention_bias", False))
    return DecoderConfig(
        **read_base(config), activation=choose(config, "hidden_act", GATED, "silu"), rope_theta=theta, rope_scaling=scaling,
        bias=bool(config.get("mlp_bias", False)), qkv_bias=attention_bias, out_bias=attention_bias,
    )  # fmt: skip


def llama_config(c: DecoderConfig) -> dict:
    """The inverse of `llama`."""
    bias = c.bias if c.qkv_bias is None else c.qkv_bias
    return write_base(c) | {"hidden_act": _back(GATED, c.activation), "attention_bias": bias, "mlp_bias": c.bias}


def mistral(config: dict) -> DecoderConfig:
    """Mistral: every layer sees a window, where there is one."""
    theta, scaling = read_rope(config)
    window = config.get("sliding_window", 4096)
    return DecoderConfig(
        **read_base(config), activation=choose(config, "hidden_act", GATED, "silu"), rope_theta=theta, rope_scaling=scaling,
        windows=(window,) if window else (),
    )  # fmt: skip


def mistral_config(c: DecoderConfig) -> dict:
    """The inverse of `mistral`."""
    window = c.windows[0] if c.windows else None
    return write_base(c) | {"hidden_act": _back(GATED, c.activation), "sliding_window": window}


def qwen2(config: dict, *, qk_norm: bool = False) -> DecoderConfig:
    """Qwen 2 and 2.5: biases on queries, keys and values; with qk_norm, Qwen 3: norms on queries and keys."""
    theta, scaling = read_rope(config)
    n, first = need(config, "num_hidden_layers"), config.get("max_window_layers", 28)
    used = bool(config.get("use_sliding_window", False)) and config.get("sliding_window") is not None
    types = [SLIDING if used and i >= first else FULL for i in range(n)]
    bias = bool(config.get("attention_bias", False)) if qk_norm else True
    return DecoderConfig(
        **read_base(config, head_dim=128 if qk_norm else None), activation=choose(config, "hidden_act", GATED, "silu"),
        rope_theta=theta, rope_scaling=scaling, qkv_bias=bias, out_bias=bias and qk_norm, qk_norm=qk_norm,
        windows=read_windows(config, types) if used else (),
    )  # fmt: skip


def qwen2_config(c: DecoderConfig) -> dict:
    """The inverse of `qwen2`."""
    windows = write_windows(c)
    return (
        write_base(c)
        | {"hidden_act": _back(GATED, c.activation), "use_sliding_window": bool(c.windows), **windows}
        | {"max_window_layers": (windows["layer_types"] + [SLIDING]).index(SLIDING)}
        | ({"attention_bias": bool(c.qkv_bias)} if c.qk_norm else {})
    )


def _gemma(config: dict, **more: Any) -> DecoderConfig:
    only(config, use_bidirectional_attention=(False, None))
    act = config.get("hidden_activation") or config.get("hidden_act") or "gelu_pytorch_tanh"
    if act not in ("gelu", "gelu_pytorch_tanh"):  # Gemma's first files say gelu and mean the tanh form
        raise UserError(f"config.json: hidden_activation={act!r} is not supported: gelu_pytorch_tanh is")
    bias = bool(config.get("attention_bias", False))
    return DecoderConfig(
        **read_base(config, tied=True, head_dim=256), activation="geglu", norm="rmsnorm_offset", embed_scale=True,
        qkv_bias=bias, out_bias=bias, **more,
    )  # fmt: skip


def gemma(config: dict) -> DecoderConfig:
    """Gemma 1: scaled embeddings, norms that add 1 to their weight."""
    theta, scaling = read_rope(config)
    return _gemma(config, rope_theta=theta, rope_scaling=scaling)


def gemma_config(c: DecoderConfig) -> dict:
    """The inverse of `gemma`."""
    act = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    return write_base(c) | act | {"attention_bias": bool(c.qkv_bias)}


def _sandwiched(config: dict, pattern: int, caps: tuple[float | None, float | None]) -> dict[str, Any]:
    """What Gemma 2 and 3 share: norms around both blocks, soft caps, and a full layer after pattern - 1 windowed ones."""
    types = [SLIDING if (i + 1) % pattern else FULL for i in range(need(config, "num_hidden_layers"))]
    return {
        "sandwich_norms": True, "attention_scale": float(config.get("query_pre_attn_scalar", 256)) ** -0.5,
        "attention_softcap": config.get("attn_logit_softcapping", caps[0]),
        "final_softcap": config.get("final_logit_softcapping", caps[1]),
        "windows": read_windows({"sliding_window": 4096, **config}, types),
    }  # fmt: skip


def gemma2(config: dict) -> DecoderConfig:
    """Gemma 2."""
    theta, scaling = read_rope(config)
    return _gemma(config, rope_theta=theta, rope_scaling=scaling, **_sandwiched(config, 2, (50.0, 30.0)))


def gemma2_config(c: DecoderConfig) -> dict:
    """The inverse of `gemma2`."""
    scale = c.dim_head**-0.5 if c.attention_scale is None else c.attention_scale
    return gemma_config(c) | write_windows(c) | {
        "query_pre_attn_scalar": round(scale**-2), "attn_logit_softcapping": c.attention_softcap,
        "final_logit_softcapping": c.final_softcap,
    }  # fmt: skip


def gemma3(config: dict) -> DecoderConfig:
    """Gemma 3's text model: five windowed layers with their own theta, then a full one; norms on queries and keys."""
    theta, scaling = read_rope(config, 1_000_000.0, FULL)
    local = config.get("rope_local_base_freq", 10_000.0)
    if SLIDING in (config.get("rope_parameters") or {}):
        local, windowed = read_rope({"rope_parameters": config["rope_parameters"]}, local, SLIDING)
        if windowed is not None:
            raise UserError(f"config.json: rope_type={windowed.kind!r} on windowed layers is not supported")
    more = _sandwiched(config, config.get("sliding_window_pattern", 6), (None, None))
    return _gemma(config, rope_theta=theta, rope_scaling=scaling, local_rope_theta=float(local), qk_norm=True, **more)


def gemma3_config(c: DecoderConfig) -> dict:
    """The inverse of `gemma3`."""
    local = c.rope_theta if c.local_rope_theta is None else c.local_rope_theta
    both = {
        FULL: {"rope_theta": c.rope_theta, **(write_scaling(c.rope_scaling) or {"rope_type": "default"})},
        SLIDING: {"rope_theta": local, "rope_type": "default"},
    }
    return gemma2_config(c) | {"rope_parameters": both, "rope_local_base_freq": local}


# what Gemma 3's files with images leave unsaid of their text model
GEMMA3_TEXT = {
    "vocab_size": 262_208, "max_position_embeddings": 131_072, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 256, "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 256,
}  # fmt: skip


def gemma3_text(config: dict) -> DecoderConfig:
    """The text model of a Gemma 3 that also reads images."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise UserError(f"config.json: text_config is {text!r}, an object is needed")
    return gemma3(GEMMA3_TEXT | {k: v for k, v in text.items() if v is not None})


def _text_only(c: DecoderConfig) -> dict:
    raise UserError("has parts for images: a text model is written as Gemma3ForCausalLM")


FAMILIES = (
    Family("GPT2LMHeadModel", "gpt2", DecoderConfig, gpt2, gpt2_config, gpt2_leaves,
           ignored=r"transformer\.h\.\d+\.attn\.(masked_)?bias|lm_head\.weight",
           renames=((r"^(?=wte\.|wpe\.|h\.|ln_f\.)", "transformer."),)),
    Family("LlamaForCausalLM", "llama", DecoderConfig, llama, llama_config, leaves, IGNORED),
    Family("MistralForCausalLM", "mistral", DecoderConfig, mistral, mistral_config, leaves, IGNORED),
    Family("Qwen2ForCausalLM", "qwen2", DecoderConfig, qwen2, qwen2_config, leaves, IGNORED),
    Family("Qwen3ForCausalLM", "qwen3", DecoderConfig, lambda config: qwen2(config, qk_norm=True), qwen2_config, leaves, IGNORED),
    Family("GemmaForCausalLM", "gemma", DecoderConfig, gemma, gemma_config, leaves, IGNORED),
    Family("Gemma2ForCausalLM", "gemma2", DecoderConfig, gemma2, gemma2_config, leaves, IGNORED),
    Family("Gemma3ForCausalLM", "gemma3_text", DecoderConfig, gemma3, gemma3_config, leaves, IGNORED),
    Family("Gemma3ForConditionalGeneration", "gemma3", DecoderConfig, gemma3_text, _text_only, leaves,
           ignored=IGNORED + r"|(model\.)?(vision_tower|multi_modal_projector)\..*",
           renames=((r"^(model\.)?language_model\.lm_head", "lm_head"), (r"^(model\.)?language_model\.(model\.)?", "model."))),
)  # fmt: skip
