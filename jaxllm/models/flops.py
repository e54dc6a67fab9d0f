"""Analytic FLOPs of models: what MFU is measured against."""

from __future__ import annotations

import math
from typing import Any

from jaxllm.core.tree import flatten
from jaxllm.models import families
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.encdec import EncDecConfig
from jaxllm.models.encoder import EncoderConfig

CONVENTION = "6 x matmul parameters x tokens + attention halved for causality; input embedding and rematerialisation not counted"


def train_flops(config: Any, batch: int, length: int, source: int | None = None) -> float:
    """FLOPs of a train step on [batch, length] tokens: forward, and twice that backward.

    6 N tokens + 12 n h k keys tokens, with N the matmul parameters of one token (the head, but no input embedding; of a mixture
    only the experts that it passes) and keys the mean number a query sees: length / 2 under a causal mask, fewer with windows,
    length both ways. No rematerialisation. PaLM (arXiv 2204.02311, appendix B), halved for causality. source: tokens of an
    encoder-decoder's inputs (default: length). Families without a formula for attention are counted by their parameters.
    """
    return 3.0 * forward_flops(config, batch, length, source)


def forward_flops(config: Any, batch: int, length: int, source: int | None = None) -> float:
    """A third of `train_flops`: 2 N tokens + 4 n h k keys tokens."""
    source = length if source is None else source
    if isinstance(config, EncDecConfig):
        read, written = encdec_parameters(config)
        return 2.0 * batch * (read * source + written * length) + batch * _encdec_attention(config, length, source)
    tokens = batch * length
    return 2.0 * matmul_parameters(config) * tokens + tokens * _attention(config, length)


def matmul_parameters(config: Any) -> int:
    """The parameters that a token is multiplied with: kernels and the head, of experts top_k of n_experts."""
    flat = {path: spec for path, spec in flatten(families.make(config).specs).items() if path.endswith("kernel")}
    moe, size = getattr(config, "moe", None), lambda spec: math.prod(spec.shape)
    share = lambda path: moe.top_k / moe.n_experts if "/experts/" in path else 1  # noqa: E731
    total = round(sum(size(spec) * share(path) for path, spec in flat.items() if path != "head/kernel"))
    return total + head_parameters(config) * (1 + getattr(config, "mtp_layers", 0))


def head_parameters(config: Any) -> int:
    """Those of the head over the vocabulary, padding left out; 0 where there is none."""
    if isinstance(config, EncoderConfig) and not config.mlm:
        return 0
    outputs = getattr(config, "outputs", getattr(config, "vocab_size", 0))
    return outputs * config.d_model


def encdec_parameters(config: EncDecConfig) -> tuple[int, int]:
    """Matmul parameters of an encoder-decoder by (an input token, a target token): keys and values of the inputs are inputs'."""
    flat = {path: math.prod(spec.shape) for path, spec in flatten(families.make(config).specs).items() if path.endswith("kernel")}
    read = sum(n for path, n in flat.items() if path.startswith("encoder/") or "/cross/k/" in path or "/cross/v/" in path)
    return read, sum(flat.values()) - read - flat.get("head/kernel", 0) + head_parameters(config)


def _keys(length: int, window: int = 0) -> float:
    """Keys that a query sees on average under a causal mask: half of the length; w - w^2 / (2 length) in a window w."""
    w = min(window or length, length)
    return w - w * w / (2 * length)


def _attention(config: Any, length: int) -> float:
    """Forward FLOPs of a token's scores and weighted values in all layers."""
    if isinstance(config, EncoderConfig):
        return 4.0 * config.n_layers * config.d_model * length
    if not isinstance(config, DecoderConfig):
        return 0.0
    widths = 2 * config.dim_head if config.mla is None else config.mla.nope_dim + config.mla.rope_dim + config.mla.value_dim
    windows = config.windows or (0,)
    keys = sum(_keys(length, windows[i % len(windows)]) for i in range(config.n_layers))
    return 2.0 * config.n_heads * widths * (keys + config.mtp_layers * _keys(length))


def _encdec_attention(config: EncDecConfig, length: int, source: int) -> float:
    """Forward FLOPs of a row's attention: inputs on inputs, targets on targets (causal), targets on inputs."""
    inside = config.n_layers * source * source + config.decoder_layers * (length * _keys(length) + length * source)
    return 4.0 * config.n_heads * config.dim_head * inside
