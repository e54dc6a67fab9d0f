"""Which positions a query sees, said without forming an array of length x length, and the kernels that attend by it.

| kernel | where | length x length |
|---|---|---|
| plain | any backend, any bias | the scores [b, h, l, l] in float32, and one mask [b, l, l] for all layers |
| blocks | any backend | never: `blocks`, in XLA |
| ring | the length split over `context` | never: `blocks`, keys and values travelling from device to device |
| splash | TPU | never: JAX's Pallas kernel |
| cudnn | GPU, bfloat16 or float16 | never without segments; with them one mask [b, 1, l, l], for all heads |

`auto`: ring where the length is split, else splash on TPU, cudnn on GPU, plain on CPU; where a shape or a dtype rules a kernel
out, blocks. Attention with a bias on its scores (T5) and attention over a cache are always plain.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from jaxllm.core.sharding import activation_axes
from jaxllm.core.types import UserError
from jaxllm.models import attention, blocks, plain

LANES = 128  # of a TPU: splash takes lengths that are multiples of it


@struct.dataclass
class Seen:
    """A query sees the keys of its own segment: when `causal` itself and earlier ones, `window` in all when above 0.

    segments int [b, l] (0: padding), or None: every row is one segment. Padding gives finite values that nothing reads; they
    differ between kernels.
    """

    segments: jax.Array | None
    shape: tuple[int, int] = struct.field(pytree_node=False)  # [b, l]
    kernel: str = struct.field(pytree_node=False, default="blocks")
    causal: bool = struct.field(pytree_node=False, default=True)
    window: int = struct.field(pytree_node=False, default=0)
    formed: jax.Array | None = None  # array(), where the kernel needs it: made once for all layers

    def array(self) -> jax.Array:
        """The same as bool [b, l, l]: what the kernels are held to."""
        if self.formed is not None:
            return self.formed
        segments = jnp.ones(self.shape, jnp.int32) if self.segments is None else self.segments
        return attention.causal_mask(segments, self.window) if self.causal else attention.full_mask(segments)

    def attend(self, q, k, v, *, scale=None, bias=None, softcap=None) -> jax.Array:
        """q [b, l, h, k]; k [b, g, l, k], v [b, g, l, w] -> [b, l, h, w], as `attention.attend` under `array()`."""
        if bias is not None:
            return attention.attend(q, k, v, self.array(), scale=scale, bias=bias, softcap=softcap)
        return KERNELS[self.kernel](q, k, v, self, scale=scale, softcap=softcap)


def see(
    name: str, segments: jax.Array | None, shape: tuple[int, int], *, causal: bool = True, window: int = 0,
    widths: tuple[int, int], dtype: Any, softcap: float | None = None,
) -> Seen:  # fmt: skip
    """What `attention.attend` takes as its mask for queries and keys of one sequence [b, l].

    widths: of a head's keys and values. Raises UserError when the named kernel cannot run here.
    """
    kernel = choose(name, shape[1], widths=widths, dtype=dtype, softcap=softcap, causal=causal)
    seen = Seen(segments, shape, kernel, causal, window)
    return seen.replace(formed=seen.array()) if kernel == "plain" else seen


# ---- which kernel


def choose(
    name: str, length: int, *, widths: tuple[int, int], dtype: Any, softcap: float | None = None, causal: bool = True
) -> str:
    """The name in KERNELS of a config's `attention`. Raises UserError when that kernel cannot run here, and says which can."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes:  # inside jax.shard_map the arrays are already parts
        return "plain"
    if name == "auto":
        return _auto(length, widths, dtype, softcap)
    if name in CANNOT and (why := CANNOT[name](length, widths, dtype, softcap)):
        raise UserError(
            f"model.attention={name}: {why}; use model.attention=auto, which takes {_auto(length, widths, dtype, softcap)}"
        )
    return name


def platform() -> str:
    """Of the current mesh's devices, which may be those of a topology that is not here; without a mesh, the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _auto(length: int, widths: tuple[int, int], dtype: Any, softcap: float | None) -> str:
    wanted = ["ring"] if _pieces(length) > 1 else []
    wanted += {"tpu": ["splash", "blocks"], "gpu": ["cudnn", "blocks"], "cuda": ["cudnn", "blocks"]}.get(platform(), [])
    return next((n for n in wanted if n not in CANNOT or not CANNOT[n](length, widths, dtype, softcap)), "plain")


def _pieces(length: int) -> int:
    """Over how many devices the length of activations is split."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    (axes,) = activation_axes(("length",), (length,), mesh)
    return 1 if axes is None else math.prod(mesh.shape[n] for n in axes)


def _no_ring(length: int, widths: tuple[int, int], dtype: Any, softcap: float | None) -> str:
    if _pieces(length) > 1:
        return ""
    return f"no mesh axis splits the length {length}: give mesh.context a divisor of it above 1"


def _no_splash(length: int, widths: tuple[int, int], dtype: Any, softcap: float | None) -> str:
    if platform() != "tpu":
        return f"the kernel is for TPUs, and this is {platform()}"
    return f"the length {length} is no multiple of {LANES}" if length % LANES else ""


def _no_cudnn(length: int, widths: tuple[int, int], dtype: Any, softcap: float | None) -> str:
    if platform() not in ("gpu", "cuda"):
        return f"the kernel is for NVIDIA GPUs, and this is {platform()}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"the kernel takes model.dtype=bfloat16 or float16, not {dtype}"
    if softcap is not None:
        return f"the kernel has no softcap (model.attention_softcap={softcap})"
    hopper = float(getattr(jax.devices()[0], "compute_capability", 9)) >= 9
    if max(widths) % 8 or max(widths) > (256 if hopper else 128):
        return f"the kernel takes heads of a multiple of 8 up to {256 if hopper else 128} here, not {max(widths)}"
    return f"the kernel takes even lengths, not {length}" if length % 2 else ""


CANNOT: dict[str, Callable[..., str]] = {"ring": _no_ring, "splash": _no_splash, "cudnn": _no_cudnn}


# ---- kernels: (q, k, v, seen, *, scale, softcap) -> [b, l, h, w]


def plain_scores(q, k, v, seen: Seen, *, scale: float | None = None, softcap: float | None = None) -> jax.Array:
    """`plain.attend` under the mask as an array; with a softcap `attention.attend`."""
    if softcap is not None:
        return attention.attend(q, k, v, seen.array(), scale=scale, softcap=softcap)
    return plain.attend(q, k, v, seen.array(), causal=seen.causal, window=seen.window, scale=scale)


def in_blocks(q, k, v, seen: Seen, *, scale=None, softcap=None, ring: bool = False, block: int = blocks.BLOCK) -> jax.Array:
    """`blocks.attend`."""
    return blocks.attend(
        q, k, v, seen.segments, causal=seen.causal, window=seen.window, scale=scale, softcap=softcap, block=block, ring=ring
    )


def cudnn(q, k, v, seen: Seen, *, scale=None, softcap=None, implementation: str = "cudnn") -> jax.Array:
    """cuDNN's flash attention by `jax.nn.dot_product_attention`.

    Segments go in as a mask [b, 1, l, l] (by itself the kernel knows causal masks and windows only), which it adds to the
    scores as a bias. Values narrower than keys (MLA) are padded to their width.
    """
    most = max(v.shape[-1], q.shape[-1])

    def local(q, k, v, segments):
        mask = None
        if segments is not None:
            mask = (segments[:, :, None] == segments[:, None, :])[:, None]
            mask = mask if seen.causal else mask & (segments != 0)[:, None, None, :]
        padded = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, most - x.shape[-1]))).transpose(0, 2, 1, 3) for x in (q, k, v))
        out = jax.nn.dot_product_attention(
            *padded, mask=mask, scale=1.0, is_causal=seen.causal, implementation=implementation,
            local_window_size=(seen.window - 1, 0) if seen.window and seen.causal else None,
        )  # fmt: skip
        return out[..., : v.shape[-1]].transpose(0, 2, 1, 3)

    return _on_each(local, q, k, v, seen.segments, scale)


def splash(q, k, v, seen: Seen, *, scale=None, softcap=None, interpret: bool = False) -> jax.Array:
    """JAX's splash attention (Pallas, TPU): blocks that the causal mask or the window leaves empty are not computed.

    Padding sees padding, in a full mask too.
    """

    def local(q, k, v, segments):
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel

        run = _splash_kernel(q.shape[1], q.shape[2], seen.causal, seen.window, softcap, interpret)
        if segments is None:
            return jax.vmap(run)(q, k, v)
        return jax.vmap(run)(q, k, v, kernel.SegmentIds(segments, segments))

    return _on_each(local, q, k, v, seen.segments, scale)


def _on_each(local: Callable, q, k, v, segments, scale: float | None) -> jax.Array:
    """local(q [b, h, l, k], scaled, k, v, segments) -> [b, h, l, w]: on a mesh for each device's rows and heads, whole length."""
    mesh = jax.sharding.get_abstract_mesh()
    q = (q * (q.shape[-1] ** -0.5 if scale is None else scale)).transpose(0, 2, 1, 3)
    if not mesh.empty and mesh.size > 1:
        rows, heads, _, _ = activation_axes(("batch", "heads", None, None), q.shape, mesh)
        k, v = (blocks.spread_heads(x, heads) for x in (k, v))
        where, whole = PartitionSpec(rows, heads), PartitionSpec(rows)
        local = jax.shard_map(local, in_specs=(where, where, where, whole), out_specs=where, check_vma=False)
    return local(q, k, v, segments).transpose(0, 2, 1, 3)


def _splash_kernel(h: int, length: int, causal: bool, window: int, softcap: float | None, interpret: bool) -> Callable:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    square = (length, length)
    mask = masks.FullMask(square)
    if causal:
        mask = masks.LocalMask(square, (window - 1, 0), 0) if window else masks.CausalMask(square)
    n = next(n for n in (512, 256, LANES) if length % n == 0)
    sizes = kernel.BlockSizes(
        block_q=n, block_kv=n, block_kv_compute=n, block_q_dkv=n, block_kv_dkv=n, block_kv_dkv_compute=n, block_q_dq=n,
        block_kv_dq=n,
    )  # fmt: skip
    return kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * h), block_sizes=sizes, head_shards=1, q_seq_shards=1, attn_logits_soft_cap=softcap,
        residual_checkpoint_name="attention_out", interpret=interpret,
    )  # fmt: skip


KERNELS: dict[str, Callable[..., jax.Array]] = {
    "plain": plain_scores,
    "blocks": in_blocks,
    "ring": partial(in_blocks, ring=True),
    "cudnn": cudnn,
    "splash": splash,
}
