"""Mixtures of experts: Mixtral, Qwen3-MoE, DeepSeek-V2 and V3, as transformers names them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxllm.convert import decoders
from jaxllm.convert.decoders import attention, ends, gated, read_base, read_rope, write_base
from jaxllm.convert.names import Family, Leaf, choose, leaf, linear, need, norm, only
from jaxllm.core.types import UserError
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.mla import MLAConfig
from jaxllm.models.moe import MoEConfig

THEIRS = "model.layers.{i}"
DEEPSEEK_IGNORED = decoders.IGNORED + r"|model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight"


def _experts(ours: str, theirs: str, names: dict[str, str], start: int = 0) -> list[Leaf]:
    """Router and experts: `theirs` has gate and experts.{e}."""
    out = linear(f"{ours}/router", f"{theirs}.gate", start=start)
    for a, b in names.items():
        out += linear(f"{ours}/experts/{a}", f"{theirs}.experts.{{e}}.{b}", start=start)
    return out


GATED = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


# ---- Mixtral


def mixtral(config: dict) -> DecoderConfig:
    """Mixtral: every layer chooses num_experts_per_tok of num_local_experts."""
    theta, scaling = read_rope(config, 1_000_000.0)
    base = read_base(config)
    window = config.get("sliding_window")
    return DecoderConfig(
        **base, activation=choose(config, "hidden_act", decoders.GATED, "silu"), rope_theta=theta, rope_scaling=scaling,
        qkv_bias=False, out_bias=False, windows=(window,) if window else (),
        moe=MoEConfig(_count(config, "num_local_experts"), need(config, "num_experts_per_tok"), base["d_ff"]),
    )  # fmt: skip


def _count(config: dict, *keys: str) -> int:
    """The first of the keys that is there."""
    return need(config, next((k for k in keys if k in config), keys[0]))


def mixtral_config(c: DecoderConfig) -> dict:
    """The inverse of `mixtral`."""
    m = _moe(c)
    return decoders.mistral_config(c) | {
        "num_local_experts": m.n_experts,
        "num_experts_per_tok": m.top_k,
        "intermediate_size": m.d_ff,
    }


def _moe(c: DecoderConfig) -> MoEConfig:
    if c.moe is None:
        raise UserError("it has no experts")
    return c.moe


def mixtral_leaves(c: DecoderConfig) -> list[Leaf]:
    """The names that hubs and save_pretrained know; transformers 5 joins the experts only in memory."""
    return [
        *ends(c), *attention(c), *norm("layers/ffn_norm", f"{THEIRS}.post_attention_layernorm"),
        *_experts("layers/ffn", f"{THEIRS}.block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}),
    ]  # fmt: skip


# ---- Qwen3-MoE


def qwen3_moe(config: dict) -> DecoderConfig:
    """Qwen3-MoE: Qwen 3's attention; the first layers may be dense."""
    only(config, decoder_sparse_step=1)
    theta, scaling = read_rope(config)
    bias = bool(config.get("attention_bias", False))
    dense = sorted(config.get("mlp_only_layers") or [])
    if dense != list(range(len(dense))):
        raise UserError(f"config.json: mlp_only_layers={dense} is not supported: only the first layers may be dense")
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    return DecoderConfig(
        **read_base(config), activation=choose(config, "hidden_act", decoders.GATED, "silu"), rope_theta=theta,
        rope_scaling=scaling, qkv_bias=bias, out_bias=bias, qk_norm=True, dense_layers=len(dense),
        windows=(window,) if window else (),
        moe=MoEConfig(
            _count(config, "num_local_experts", "num_experts"), need(config, "num_experts_per_tok"),
            need(config, "moe_intermediate_size"), normalise=bool(config.get("norm_topk_prob", False)),
        ),
    )  # fmt: skip


def qwen3_moe_config(c: DecoderConfig) -> dict:
    """The inverse of `qwen3_moe`."""
    m = _moe(c)
    return decoders.mistral_config(c) | {
        "num_experts": m.n_experts, "num_local_experts": m.n_experts, "num_experts_per_tok": m.top_k,
        "moe_intermediate_size": m.d_ff, "norm_topk_prob": m.normalise, "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(c.dense_layers)), "attention_bias": bool(c.qkv_bias),
        "use_sliding_window": bool(c.windows),
    }  # fmt: skip


def qwen3_moe_leaves(c: DecoderConfig) -> list[Leaf]:
    """Two stacks, where the first layers are dense."""
    out = ends(c)
    if c.dense_layers:
        out += attention(c, "first_layers") + gated("first_layers/ffn", f"{THEIRS}.mlp")
        out += norm("first_layers/ffn_norm", f"{THEIRS}.post_attention_layernorm")
    out += attention(c, start=c.dense_layers) + _experts("layers/ffn", f"{THEIRS}.mlp", GATED, c.dense_layers)
    return out + norm("layers/ffn_norm", f"{THEIRS}.post_attention_layernorm", start=c.dense_layers)


# ---- DeepSeek


def _deepseek(config: dict, **moe: Any) -> DecoderConfig:
    """What V2 and V3 share: latent attention, dense first layers, shared experts."""
    only(config, attention_bias=False, mlp_bias=False, moe_layer_freq=1, rope_interleave=True, ep_size=1)
    theta, scaling = read_rope(config)
    n, dense = need(config, "num_hidden_layers"), config.get("first_k_dense_replace") or 0
    latent = MLAConfig(
        config.get("q_lora_rank", 1536), need(config, "kv_lora_rank"), need(config, "qk_nope_head_dim"),
        need(config, "qk_rope_head_dim"), need(config, "v_head_dim"),
    )  # fmt: skip
    experts = MoEConfig(
        need(config, "n_routed_experts"), need(config, "num_experts_per_tok"), need(config, "moe_intermediate_size"),
        n_shared=config.get("n_shared_experts") or 0, scale=float(config.get("routed_scaling_factor", 1.0)), **moe,
    )  # fmt: skip
    base = {**read_base(config), "n_kv_heads": None, "head_dim": None}
    return DecoderConfig(
        **base, activation=choose(config, "hidden_act", decoders.GATED, "silu"), rope_theta=theta, rope_scaling=scaling,
        qkv_bias=False, out_bias=False, mla=latent, moe=experts if dense < n else None, dense_layers=dense if dense < n else 0,
    )  # fmt: skip


def _deepseek_config(c: DecoderConfig) -> dict:
    m = _moe(c)
    if c.mla is None:
        raise UserError("it has no latent attention")
    return {**write_base(c), "head_dim": c.mla.rope_dim} | {
        "hidden_act": "silu", "attention_bias": False, "q_lora_rank": c.mla.q_rank, "kv_lora_rank": c.mla.kv_rank,
        "qk_nope_head_dim": c.mla.nope_dim, "qk_rope_head_dim": c.mla.rope_dim, "v_head_dim": c.mla.value_dim,
        "n_routed_experts": m.n_experts, "num_experts_per_tok": m.top_k, "moe_intermediate_size": m.d_ff,
        "n_shared_experts": m.n_shared, "routed_scaling_factor": m.scale, "norm_topk_prob": m.normalise, "moe_layer_freq": 1,
        "first_k_dense_replace": c.dense_layers, "n_group": m.n_groups, "topk_group": m.topk_groups,
    }  # fmt: skip


def deepseek_v2(config: dict) -> DecoderConfig:
    """DeepSeek-V2: softmax scores, greedy or from the best groups; the chosen weights are scaled, not normalised."""
    only(config, norm_topk_prob=(False, None), scoring_func="softmax", topk_method=("greedy", "group_limited_greedy"))
    grouped = config.get("topk_method", "greedy") == "group_limited_greedy"
    groups = {"n_groups": need(config, "n_group"), "topk_groups": need(config, "topk_group")} if grouped else {}
    return _deepseek(config, normalise=False, **groups)


def deepseek_v2_config(c: DecoderConfig) -> dict:
    """The inverse of `deepseek_v2`."""
    method = "group_limited_greedy" if _moe(c).n_groups > 1 else "greedy"
    return _deepseek_config(c) | {"topk_method": method, "scoring_func": "softmax"}


def deepseek_v3(config: dict) -> DecoderConfig:
    """DeepSeek-V3: sigmoid scores, a correction bias that only chooses, groups by their best two."""
    only(config, scoring_func="sigmoid", topk_method="noaux_tc")
    c = _deepseek(
        config, scoring="sigmoid", normalise=bool(config.get("norm_topk_prob", True)), n_groups=config.get("n_group") or 1,
        topk_groups=config.get("topk_group") or 1, group_score="top2", bias=True,
    )  # fmt: skip
    return dataclasses.replace(c, mtp_layers=config.get("num_nextn_predict_layers") or 0)


def deepseek_v3_config(c: DecoderConfig) -> dict:
    """The inverse of `deepseek_v3`."""
    return _deepseek_config(c) | {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "rope_interleave": True,
        "num_nextn_predict_layers": c.mtp_layers,
    }


def drop_absent_mtp(c: DecoderConfig, names: Iterable[str]) -> DecoderConfig:
    """transformers writes num_nextn_predict_layers and leaves the modules out: what the files hold decides."""
    layers = {int(m[1]) for name in names if (m := re.match(r"model\.layers\.(\d+)\.eh_proj", name))}
    return dataclasses.replace(c, mtp_layers=min(c.mtp_layers, len(layers)))


def _halves(a: np.ndarray, dim: int) -> np.ndarray:
    """The last `dim` columns from interleaved pairs (their rotary layout) to two halves (ours)."""
    rest, turned = a[..., :-dim], a[..., -dim:]
    return np.concatenate([rest, turned[..., 0::2], turned[..., 1::2]], axis=-1)


def _pairs(a: np.ndarray, dim: int) -> np.ndarray:
    """The inverse of `_halves`."""
    out = a.copy()
    out[..., -dim::2], out[..., a.shape[-1] - dim + 1 :: 2] = a[..., -dim : -dim // 2], a[..., -(dim // 2) :]
    return out


def latent_attention(c: DecoderConfig, ours: str, start: int) -> list[Leaf]:
    """One stack's latent attention, with the norm before it."""
    m, theirs = c.mla, f"{THEIRS}.self_attn"
    q_dim, rope = m.nope_dim + m.rope_dim, m.rope_dim

    def queries(path: str, name: str) -> Leaf:
        def read(t: np.ndarray) -> np.ndarray:
            return _halves(t.T.reshape(-1, c.n_heads, q_dim), rope)

        return leaf(path, name, read, lambda a: _pairs(a, rope).reshape(a.shape[0], -1).T, start=start)

    if m.q_rank is None:
        out = [queries(f"{ours}/q/kernel", f"{theirs}.q_proj.weight")]
    else:
        out = [
            *linear(f"{ours}/q_a", f"{theirs}.q_a_proj", start=start),
            *norm(f"{ours}/q_a_norm", f"{theirs}.q_a_layernorm", start=start),
            queries(f"{ours}/q_b/kernel", f"{theirs}.q_b_proj.weight"),
        ]
    return [
        *out,
        leaf(
            f"{ours}/kv_a/kernel", f"{theirs}.kv_a_proj_with_mqa.weight",
            lambda t: _halves(t.T, rope), lambda a: _pairs(a, rope).T, start=start,
        ),
        *norm(f"{ours}/kv_a_norm", f"{theirs}.kv_a_layernorm", start=start),
        *linear(f"{ours}/kv_b", f"{theirs}.kv_b_proj", out=(c.n_heads, m.nope_dim + m.value_dim), start=start),
        *linear(f"{ours}/o", f"{theirs}.o_proj", inp=(c.n_heads, m.value_dim), start=start),
    ]  # fmt: skip


def _deepseek_layers(c: DecoderConfig, ours: str, start: int, sparse: bool) -> list[Leaf]:
    """One stack of layers: latent attention, and experts or a dense network."""
    out = [
        *norm(f"{ours}/attention_norm", f"{THEIRS}.input_layernorm", start=start),
        *latent_attention(c, f"{ours}/attention", start),
        *norm(f"{ours}/ffn_norm", f"{THEIRS}.post_attention_layernorm", start=start),
    ]
    if not sparse:
        return out + gated(f"{ours}/ffn", f"{THEIRS}.mlp", start=start)
    out += _experts(f"{ours}/ffn", f"{THEIRS}.mlp", GATED, start)
    if c.moe.bias:
        name = f"{THEIRS}.mlp.gate.e_score_correction_bias"
        out.append(leaf(f"{ours}/ffn/router/bias", name, start=start, float32=True))
    return out + (gated(f"{ours}/ffn/shared", f"{THEIRS}.mlp.shared_experts", start=start) if c.moe.n_shared else [])


def deepseek_leaves(c: DecoderConfig) -> list[Leaf]:
    """Dense layers, layers with experts, and the modules that predict further tokens, as layers behind the last."""
    out = ends(c) + _deepseek_layers(c, "layers", c.dense_layers, sparse=c.moe is not None)
    if c.dense_layers:
        out += _deepseek_layers(c, "first_layers", 0, sparse=False)
    if c.mtp_layers:
        n = c.n_layers
        out += _deepseek_layers(c, "mtp/layer", n, sparse=c.moe is not None)
        out += linear("mtp/merge", f"{THEIRS}.eh_proj", start=n)
        names = {"embed_norm": "enorm", "hidden_norm": "hnorm", "final_norm": "shared_head.norm"}
        out += [x for a, b in names.items() for x in norm(f"mtp/{a}", f"{THEIRS}.{b}", start=n)]
    return out


FAMILIES = (
    Family("MixtralForCausalLM", "mixtral", DecoderConfig, mixtral, mixtral_config, mixtral_leaves, decoders.IGNORED),
    Family("Qwen3MoeForCausalLM", "qwen3_moe", DecoderConfig, qwen3_moe, qwen3_moe_config, qwen3_moe_leaves, decoders.IGNORED),
    Family("DeepseekV2ForCausalLM", "deepseek_v2", DecoderConfig, deepseek_v2, deepseek_v2_config, deepseek_leaves,
           DEEPSEEK_IGNORED),
    Family("DeepseekV3ForCausalLM", "deepseek_v3", DecoderConfig, deepseek_v3, deepseek_v3_config, deepseek_leaves,
           DEEPSEEK_IGNORED, adjust=drop_absent_mtp),
)  # fmt: skip
