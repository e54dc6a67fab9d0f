"""The formulas against every matrix product that is traced, and against published parameter counts."""

import jax
import jax.numpy as jnp
import pytest

from experiments.moe import active_count
from experiments.plan.cost import executed_flops
from jaxllm.core import ops
from jaxllm.models import decoder, encdec, encoder, families, flops
from jaxllm.models.mla import MLAConfig
from jaxllm.models.presets import preset

SMALL = dict(vocab_size=128, d_model=16, n_layers=3, n_heads=4, d_ff=24)
LLAMA = decoder.DecoderConfig(**SMALL, n_kv_heads=2, tied=False, attention="plain")
GPT = decoder.DecoderConfig(**SMALL, activation="gelu", positions="learned", bias=True, norm="layernorm", attention="plain")
MLA = decoder.DecoderConfig(**SMALL, mla=MLAConfig(12, 8, 6, 4, 5), attention="plain")
BERT = encoder.EncoderConfig(**SMALL)
T5 = encdec.EncDecConfig(**SMALL, n_decoder_layers=2)


def traced(config, rows, length, source):
    """FLOPs of the products of a forward pass with all logits."""
    model = families.make(config)
    params = jax.eval_shape(lambda k: jax.tree.map(lambda s: jnp.zeros(s.shape), model.specs), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    record = {"tokens": tokens, "segments": tokens, "inputs": {"tokens": jax.ShapeDtypeStruct((rows, source), jnp.int32)}}

    def forward(params, record):
        return ops.logits(model.head(params), ops.forward(model, params, record).hidden)

    return executed_flops(jax.make_jaxpr(forward)(params, record).jaxpr)


@pytest.mark.parametrize("config", [LLAMA, GPT, MLA], ids=["llama", "gpt", "mla"])
def test_a_decoder_without_the_causal_half(config):
    rows, length = 2, 8
    products = 2.0 * flops.matmul_parameters(config) * rows * length
    attention = flops.forward_flops(config, rows, length) - products
    assert traced(config, rows, length, 0) == products + 2 * attention
    assert flops.train_flops(config, rows, length) == 3 * (products + attention)


def test_an_encoder():
    assert traced(BERT, 2, 8, 0) == flops.forward_flops(BERT, 2, 8)


def test_an_encoder_decoder():
    rows, length, source = 2, 8, 12
    half = 4.0 * T5.n_heads * T5.dim_head * T5.decoder_layers * rows * length * length / 2
    assert traced(T5, rows, length, source) == flops.forward_flops(T5, rows, length, source) + half


def test_published_models():
    """Parameters without input embedding and norms; of a mixture those that one token passes."""
    gpt2, llama, mixtral = preset("gpt2"), preset("llama3.1-8b"), preset("mixtral-8x7b")
    biases = 12 * (3 * 768 + 768 + 3072 + 768)
    assert flops.matmul_parameters(gpt2) == 124_439_808 - 1024 * 768 - 25 * 2 * 768 - biases
    for c, whole in ((llama, decoder.published_count(llama)), (mixtral, active_count(mixtral))):
        norms = (2 * c.n_layers + 1) * c.d_model
        assert flops.matmul_parameters(c) == whole - c.vocab_size * c.d_model - norms


def test_windows_see_fewer_keys():
    full, local = (flops.train_flops(decoder.DecoderConfig(**SMALL, windows=w), 1, 64) for w in ((), (8,)))
    # of 64 keys half, against min(i, 8) of query i: 8 - 8 * 8 / 128
    assert full - local == 12 * 3 * 16 * (32 - 7.5) * 64
