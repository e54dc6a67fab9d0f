"""What a decoder is: one frozen record for GPT-2, Llama, Mistral, Qwen, Gemma, Mixtral, DeepSeek and ImageGPT."""

from __future__ import annotations

from dataclasses import dataclass

from jaxllm.core.types import UserError
from jaxllm.models import ffn, kernels, moe
from jaxllm.models import stack as layer_stack
from jaxllm.models.layers import RopeScaling, padded
from jaxllm.models.mla import MLAConfig
from jaxllm.models.moe import MoEConfig


@dataclass(frozen=True)
class DecoderConfig:
    """An architecture. The defaults are Llama's parts; see `presets` for published ones."""

    vocab_size: int
    max_length: int = 1024  # the context: the longest position a learned table has, and what data is packed to
    d_model: int = 128
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int | None = None  # None: as many as n_heads
    head_dim: int | None = None  # None: d_model / n_heads
    d_ff: int = 512
    positions: str = "rope"  # rope | learned
    norm: str = "rmsnorm"  # rmsnorm | rmsnorm_offset | layernorm
    activation: str = "swiglu"  # a kind of ffn.KINDS
    bias: bool = False
    qkv_bias: bool | None = None  # None: as bias
    out_bias: bool | None = None  # of attention's output; None: as bias
    tied: bool = True  # the output head is the embedding transposed
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None  # of layers with a window, without scaling; None: as the others
    windows: tuple[int, ...] = ()  # the pattern of attention windows that repeats over the layers; 0: unlimited
    qk_norm: bool = False
    sandwich_norms: bool = False  # norms on what attention and feed-forward add, too
    embed_scale: bool = False  # embeddings times sqrt(d_model)
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_softcap: float | None = None
    final_softcap: float | None = None  # on the logits
    moe: MoEConfig | None = None  # feed-forward networks become experts,
    dense_layers: int = 0  # but for the first few layers
    mla: MLAConfig | None = None  # latent attention in place of grouped-query attention
    mtp_layers: int = 0  # multi-token prediction: extra layers that predict further tokens
    n_outputs: int | None = None  # the head predicts the first n_outputs ids only; None: all
    norm_eps: float = 1e-5
    attention: str = "auto"  # the kernel: auto | plain | blocks | ring | splash | cudnn (see `kernels`)
    dtype: str = "float32"  # of activations; parameters stay float32
    remat: str = "none"  # of stack.POLICIES: none | dots | attention | full | offload
    unroll: bool = False

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def dim_head(self) -> int:
        return self.head_dim or self.d_model // self.n_heads

    @property
    def padded_vocab(self) -> int:
        return padded(self.vocab_size)

    @property
    def outputs(self) -> int:
        return self.n_outputs or self.vocab_size


ALLOWED = {
    "positions": ("rope", "learned"),
    "norm": ("rmsnorm", "rmsnorm_offset", "layernorm"),
    "activation": tuple(ffn.KINDS),
    "attention": ("auto", *kernels.KERNELS),
    "remat": tuple(layer_stack.POLICIES),
    "dtype": ("float32", "bfloat16", "float16"),
}


def validate(c: DecoderConfig) -> None:
    """Raises UserError on the first thing that cannot be built."""
    for name, allowed in ALLOWED.items():
        if (value := getattr(c, name)) not in allowed:
            raise UserError(f"model.{name}={value!r}: choose one of {', '.join(allowed)}")
    for name in ("vocab_size", "max_length", "d_model", "n_layers", "n_heads", "d_ff"):
        if getattr(c, name) < 1:
            raise UserError(f"model.{name}={getattr(c, name)}: must be at least 1")
    if c.rope_scaling is not None and c.rope_scaling.kind not in ("linear", "llama3", "yarn"):
        raise UserError(f"model.rope_scaling.kind={c.rope_scaling.kind!r}: choose one of linear, llama3, yarn")
    if c.moe is not None:
        moe.validate(c.moe)
    if c.dense_layers and (c.moe is None or c.dense_layers >= c.n_layers):
        raise UserError(f"model.dense_layers={c.dense_layers}: needs model.moe, and fewer than n_layers={c.n_layers}")
    if c.n_outputs is not None and (c.tied or not 0 < c.n_outputs <= c.vocab_size):
        raise UserError(f"model.n_outputs={c.n_outputs}: needs tied=False and at most vocab_size={c.vocab_size}")
    if c.mla is None:
        _validate_heads(c)
    elif c.mla.rope_dim % 2 or c.positions != "rope":
        raise UserError(f"model.mla.rope_dim={c.mla.rope_dim}: needs positions=rope and an even number")


def _that_divide(c: DecoderConfig) -> str:
    """The nearest numbers of heads and widths with which a model works."""
    even = 2 if c.positions == "rope" else 1
    heads = [h for h in range(1, c.d_model + 1) if c.d_model % (h * even) == 0 and h % (c.n_kv_heads or h) == 0]
    heads = sorted(sorted(heads, key=lambda h: abs(h - c.n_heads))[:2])
    unit = c.n_heads * even
    widths = [d for d in (c.d_model // unit * unit, (c.d_model // unit + 1) * unit) if d]
    said = {"n_heads": heads, "d_model": widths}
    return ", or ".join(f"{name}={' or '.join(map(str, values))}" for name, values in said.items() if values)


def _validate_heads(c: DecoderConfig) -> None:
    if c.head_dim is None and c.d_model % c.n_heads:
        raise UserError(f"model.n_heads={c.n_heads} does not divide model.d_model={c.d_model}: use {_that_divide(c)}")
    if c.kv_heads < 1 or c.n_heads % c.kv_heads:
        fits = [n for n in range(1, c.n_heads + 1) if c.n_heads % n == 0]
        raise UserError(f"model.n_kv_heads={c.kv_heads} does not divide model.n_heads={c.n_heads}: use one of {fits}")
    if c.dim_head < 1 or c.positions == "rope" and c.dim_head % 2:
        raise UserError(f"model.head_dim={c.dim_head}: rotary positions need an even number, such as {max(2, c.dim_head + 1)}")
