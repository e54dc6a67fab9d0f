"""Named architectures. Shapes are the published ones; their parameter counts are tested."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxllm.core.types import UserError
from jaxllm.models.decoder import DecoderConfig

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

PRESETS: dict[str, DecoderConfig] = {
    "tiny": TINY,
    "gpt2": GPT2,
    "gpt3-125m": _gpt3(12, 768, 12, 64),
    "gpt3-350m": _gpt3(24, 1024, 16, 64),
    "gpt3-760m": _gpt3(24, 1536, 16, 96),
    "gpt3-1.3b": _gpt3(24, 2048, 16, 128),
    "gpt3-2.7b": _gpt3(32, 2560, 32, 80),
    "gpt3-6.7b": _gpt3(32, 4096, 32, 128),
    "gpt3-13b": _gpt3(40, 5140, 40, 128),
    "gpt3-175b": _gpt3(96, 12_288, 96, 128),
    # Llama 3.2 1B without its frequency scaling, which only matters beyond a context of 8,192
    "llama3-1b": replace(LLAMA3_8B, d_model=2048, n_layers=16, d_ff=8192, tied=True),
    "llama3-8b": LLAMA3_8B,
    "llama3-70b": replace(LLAMA3_8B, d_model=8192, n_layers=80, n_heads=64, d_ff=28_672),
}


def preset(name: str, **changes: Any) -> DecoderConfig:
    """A preset with some fields changed. Raises UserError on an unknown name or field."""
    if name not in PRESETS:
        raise UserError(f"unknown model preset {name!r}: choose one of {', '.join(PRESETS)}")
    unknown = sorted(set(changes) - set(DecoderConfig.__dataclass_fields__))
    if unknown:
        raise UserError(f"unknown model setting {unknown[0]!r}: the fields are {', '.join(DecoderConfig.__dataclass_fields__)}")
    return replace(PRESETS[name], **changes)
