"""Tiny decoders in both styles, with weights that hide nothing, and sequence records for them."""

import jax
import numpy as np

from jaxllm.core import spec
from jaxllm.models.decoder import DecoderConfig

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
STYLES = {"gpt2": GPT2, "llama": LLAMA}


def weights(specs, seed=0):
    """Initial values plus noise, so that no bias is 0, no scale is 1 and no embedding is small."""

    @jax.jit
    def make(key):
        params = spec.init(specs, key)
        leaves, treedef = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
        noisy = [x + 0.2 * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys, strict=True)]
        return jax.tree.unflatten(treedef, noisy)

    return make(jax.random.key(seed))


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
