"""Tiny decoders in both styles, with weights that hide nothing, and sequence records for them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core.tree import map_paths
from jaxllm.models.decoder import DecoderConfig
from jaxllm.models.layers import RopeScaling
from jaxllm.models.mla import MLAConfig
from jaxllm.models.moe import MoEConfig

LLAMA = DecoderConfig(
    vocab_size=50,
    max_length=32,
    d_model=16,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_ff=24,
    tied=False,
    rope_theta=100.0,
)
GPT2 = DecoderConfig(
    vocab_size=50, max_length=32, d_model=16, n_layers=2, n_heads=2, d_ff=32,
    positions="learned", norm="layernorm", activation="gelu", bias=True,
)  # fmt: skip
# compiles in half the time; the mathematics is the same
fast_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
# every part that Gemma 2 and 3 add, and five layers of a pattern of three: a group and two that are left
GEMMA = DecoderConfig(
    vocab_size=50, max_length=32, d_model=16, n_layers=5, n_heads=2, n_kv_heads=1, head_dim=6, d_ff=24, norm="rmsnorm_offset",
    activation="geglu", rope_theta=100.0, local_rope_theta=10.0, rope_scaling=RopeScaling("linear", 4.0), windows=(3, 2, 0),
    qk_norm=True, sandwich_norms=True, embed_scale=True, attention_scale=0.3, attention_softcap=5.0, final_softcap=3.0,
)  # fmt: skip
DEEPSEEK = DecoderConfig(
    vocab_size=50, max_length=32, d_model=16, n_layers=3, n_heads=2, d_ff=24, tied=False, rope_theta=100.0, dense_layers=1,
    rope_scaling=RopeScaling("yarn", 4.0, 8, mscale=0.7, mscale_all_dim=0.9), mla=MLAConfig(12, 8, 6, 4, 5), mtp_layers=2,
    moe=MoEConfig(4, 2, 8, n_shared=1, scoring="sigmoid", scale=2.5, n_groups=2, topk_groups=1, group_score="top2", bias=True),
)  # fmt: skip
STYLES = {"gpt2": GPT2, "llama": LLAMA, "gemma": GEMMA, "deepseek": DEEPSEEK}


def weights(specs, seed=0):
    """Random weights from numpy: no bias is 0, no scale is 1, no embedding is small."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        noise = 0.3 * rng.normal(size=leaf.shape).astype(np.float32)
        return jnp.asarray(1 + noise if path.endswith("/scale") else noise)

    return map_paths(one, specs)


def record(rows, length, mask=None):
    """A sequence record from rows of documents (token arrays); m tokens take m - 1 positions."""
    out = {k: np.zeros((len(rows), length), np.int32) for k in ("tokens", "targets", "segments")}
    out["mask"] = np.zeros((len(rows), length), bool)
    for i, documents in enumerate(rows):
        at = 0
        for number, document in enumerate(documents, start=1):
            n = len(document) - 1
            out["tokens"][i, at : at + n], out["targets"][i, at : at + n] = document[:-1], document[1:]
            out["segments"][i, at : at + n], out["mask"][i, at : at + n] = number, True
            at += n
    if mask is not None:
        out["mask"] &= mask
    return out


def documents(lengths, seed=0, vocab=50):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, vocab, n).astype(np.int32) for n in lengths]
