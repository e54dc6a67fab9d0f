"""Named architectures. Shapes are the published ones; their parameter counts are tested."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxllm.core.types import UserError
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.layers import RopeScaling
from jaxllm.models.mla import MLAConfig
from jaxllm.models.moe import MoEConfig

TINY = DecoderConfig(vocab_size=1024, max_length=128, d_model=96, n_layers=2, n_heads=3, d_ff=256, unroll=True)

GPT2 = DecoderConfig(
    vocab_size=50_257, max_length=1024, d_model=768, n_layers=12, n_heads=12, d_ff=3072,
    positions="learned", norm="layernorm", activation="gelu", bias=True,
)  # fmt: skip


def _gpt3(layers: int, d: int, heads: int, head_dim: int) -> DecoderConfig:
    """A row of Table 2.1 of arXiv 2005.14165; every layer is dense where GPT-3 alternates dense and sparse attention.

    The 1.3B row has 16 heads: the table's 24 heads of 128 contradict both its width and its parameter count.
    """
    return replace(GPT2, max_length=2048, d_model=d, n_layers=layers, n_heads=heads, head_dim=head_dim, d_ff=4 * d)


LLAMA3_8B = DecoderConfig(
    vocab_size=128_256, max_length=8192, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, d_ff=14_336,
    tied=False, rope_theta=500_000.0, dtype="bfloat16", remat="full",
)  # fmt: skip

LLAMA2_7B = replace(LLAMA3_8B, vocab_size=32_000, max_length=4096, n_kv_heads=None, d_ff=11_008, rope_theta=10_000.0)


def _llama31(factor: float, **changes: Any) -> DecoderConfig:
    """Llama 3.1 and 3.2: the context is stretched by scaling the frequencies."""
    scaling = RopeScaling("llama3", factor, 8192, low_factor=1.0, high_factor=4.0)
    return replace(LLAMA3_8B, max_length=131_072, rope_scaling=scaling, **changes)


MISTRAL_7B = replace(LLAMA3_8B, vocab_size=32_000, max_length=32_768, rope_theta=10_000.0, windows=(4096,))
QWEN2_7B = replace(
    LLAMA3_8B, vocab_size=152_064, max_length=131_072, d_model=3584, n_layers=28, n_heads=28, n_kv_heads=4, d_ff=18_944,
    rope_theta=1e6, norm_eps=1e-6, qkv_bias=True,
)  # fmt: skip
QWEN3_8B = replace(
    LLAMA3_8B, vocab_size=151_936, max_length=40_960, n_layers=36, head_dim=128, d_ff=12_288, rope_theta=1e6,
    norm_eps=1e-6, qk_norm=True,
)  # fmt: skip
GEMMA_2B = DecoderConfig(
    vocab_size=256_000, max_length=8192, d_model=2048, n_layers=18, n_heads=8, n_kv_heads=1, head_dim=256, d_ff=16_384,
    norm="rmsnorm_offset", activation="geglu", embed_scale=True, norm_eps=1e-6, dtype="bfloat16", remat="full",
)  # fmt: skip
GEMMA2_2B = replace(
    GEMMA_2B, d_model=2304, n_layers=26, n_kv_heads=4, d_ff=9216, windows=(4096, 0), sandwich_norms=True,
    attention_scale=256**-0.5, attention_softcap=50.0, final_softcap=30.0,
)  # fmt: skip
GEMMA3_1B = replace(
    GEMMA2_2B, vocab_size=262_144, max_length=32_768, d_model=1152, n_heads=4, n_kv_heads=1, d_ff=6912,
    windows=(512,) * 5 + (0,), rope_theta=1e6, local_rope_theta=10_000.0, qk_norm=True,
    attention_softcap=None, final_softcap=None,
)  # fmt: skip
DEEPSEEK_V2_LITE = replace(
    LLAMA3_8B, vocab_size=102_400, max_length=163_840, d_model=2048, n_layers=27, n_heads=16, n_kv_heads=None, d_ff=10_944,
    rope_theta=10_000.0, norm_eps=1e-6, dense_layers=1, mla=MLAConfig(None, 512, 128, 64, 128),
    rope_scaling=RopeScaling("yarn", 40.0, 4096, mscale=0.707, mscale_all_dim=0.707),
    moe=MoEConfig(64, 6, 1408, n_shared=2, normalise=False),
)  # fmt: skip
DEEPSEEK_V2 = replace(
    DEEPSEEK_V2_LITE, d_model=5120, n_layers=60, n_heads=128, d_ff=12_288, mla=MLAConfig(1536, 512, 128, 64, 128),
    moe=MoEConfig(160, 6, 1536, n_shared=2, normalise=False, scale=16.0, n_groups=8, topk_groups=3),
)  # fmt: skip
DEEPSEEK_V3 = replace(
    DEEPSEEK_V2, vocab_size=129_280, d_model=7168, n_layers=61, d_ff=18_432, dense_layers=3, mtp_layers=1,
    rope_scaling=RopeScaling("yarn", 40.0, 4096, mscale=1.0, mscale_all_dim=1.0),
    moe=MoEConfig(
        256, 8, 2048, n_shared=1, scoring="sigmoid", scale=2.5, n_groups=8, topk_groups=4, group_score="top2", bias=True
    ),
)  # fmt: skip


def _imagegpt(layers: int, d: int, heads: int) -> DecoderConfig:
    """Pixels of 512 palette colours behind a start token, which is never predicted (Chen et al., ICML 2020)."""
    return replace(
        GPT2, vocab_size=513, n_outputs=512, max_length=1024, d_model=d, n_layers=layers, n_heads=heads, d_ff=4 * d,
        norm="rmsnorm", activation="quick_gelu", tied=False,
    )  # fmt: skip


PRESETS: dict[str, DecoderConfig] = {
    "tiny": TINY,
    "gpt2": GPT2,
    "gpt2-medium": replace(GPT2, d_model=1024, n_layers=24, n_heads=16, d_ff=4096),
    "gpt2-large": replace(GPT2, d_model=1280, n_layers=36, n_heads=20, d_ff=5120),
    "gpt2-xl": replace(GPT2, d_model=1600, n_layers=48, n_heads=25, d_ff=6400),
    "gpt3-125m": _gpt3(12, 768, 12, 64),
    "gpt3-350m": _gpt3(24, 1024, 16, 64),
    "gpt3-760m": _gpt3(24, 1536, 16, 96),
    "gpt3-1.3b": _gpt3(24, 2048, 16, 128),
    "gpt3-2.7b": _gpt3(32, 2560, 32, 80),
    "gpt3-6.7b": _gpt3(32, 4096, 32, 128),
    "gpt3-13b": _gpt3(40, 5140, 40, 128),
    "gpt3-175b": _gpt3(96, 12_288, 96, 128),
    "llama2-7b": LLAMA2_7B,
    "llama2-13b": replace(LLAMA2_7B, d_model=5120, n_layers=40, n_heads=40, d_ff=13_824),
    "llama2-70b": replace(LLAMA2_7B, d_model=8192, n_layers=80, n_heads=64, n_kv_heads=8, d_ff=28_672),
    "llama3-8b": LLAMA3_8B,
    "llama3-70b": replace(LLAMA3_8B, d_model=8192, n_layers=80, n_heads=64, d_ff=28_672),
    "llama3.1-8b": _llama31(8.0),
    "llama3.1-405b": _llama31(8.0, d_model=16_384, n_layers=126, n_heads=128, d_ff=53_248),
    "llama3.2-1b": _llama31(32.0, d_model=2048, n_layers=16, d_ff=8192, tied=True),
    "llama3.2-3b": _llama31(32.0, d_model=3072, n_layers=28, n_heads=24, d_ff=8192, tied=True),
    "mistral-7b": MISTRAL_7B,
    "qwen2-0.5b": replace(QWEN2_7B, vocab_size=151_936, d_model=896, n_layers=24, n_heads=14, n_kv_heads=2, d_ff=4864, tied=True),
    "qwen2-7b": QWEN2_7B,
    "qwen3-0.6b": replace(QWEN3_8B, d_model=1024, n_layers=28, n_heads=16, d_ff=3072, tied=True),
    "qwen3-8b": QWEN3_8B,
    "gemma-2b": GEMMA_2B,
    "gemma-7b": replace(GEMMA_2B, d_model=3072, n_layers=28, n_heads=16, n_kv_heads=16, d_ff=24_576),
    "gemma2-2b": GEMMA2_2B,
    "gemma2-9b": replace(GEMMA2_2B, d_model=3584, n_layers=42, n_heads=16, n_kv_heads=8, d_ff=14_336),
    "gemma3-1b": GEMMA3_1B,
    # the text part of the 4B model, which also reads images
    "gemma3-4b": replace(
        GEMMA3_1B,
        vocab_size=262_208,
        max_length=131_072,
        d_model=2560,
        n_layers=34,
        n_heads=8,
        n_kv_heads=4,
        d_ff=10_240,
        windows=(1024,) * 5 + (0,),
        rope_scaling=RopeScaling("linear", 8.0),
    ),  # fmt: skip
    "mixtral-8x7b": replace(MISTRAL_7B, rope_theta=1e6, windows=(), moe=MoEConfig(8, 2, 14_336)),
    "qwen3-30b-a3b": replace(QWEN3_8B, d_model=2048, n_layers=48, n_kv_heads=4, d_ff=6144, moe=MoEConfig(128, 8, 768)),
    "deepseek-v2-lite": DEEPSEEK_V2_LITE,
    "deepseek-v2": DEEPSEEK_V2,
    "deepseek-v3": DEEPSEEK_V3,
    "imagegpt-small": _imagegpt(24, 512, 8),
    "imagegpt-medium": _imagegpt(36, 1024, 8),
    "imagegpt-large": _imagegpt(48, 1536, 16),
}


def preset(name: str, **changes: Any) -> DecoderConfig:
    """A preset with some fields changed. Raises UserError on an unknown name or field."""
    if name not in PRESETS:
        raise UserError(f"unknown model preset {name!r}: choose one of {', '.join(PRESETS)}")
    unknown = sorted(set(changes) - set(DecoderConfig.__dataclass_fields__))
    if unknown:
        raise UserError(f"unknown model setting {unknown[0]!r}: the fields are {', '.join(DecoderConfig.__dataclass_fields__)}")
    return replace(PRESETS[name], **changes)
