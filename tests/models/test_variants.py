"""What some decoders add: windows, scaled rotary frequencies, latent caches, and prediction of several tokens."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core import ops
from jaxllm.losses import lm
from jaxllm.models import attention, decoder, layers
from jaxllm.models.layers import RopeScaling
from tests.models.tiny import DEEPSEEK, GEMMA, LLAMA, documents, fast_jit, record, weights


def reach(config, length=9):
    """bool [l, l]: whether position l's hidden state depends on the embedding at s."""
    model = decoder.make(config)
    params = weights(model.specs)
    embeds = jax.random.normal(jax.random.key(0), (1, length, config.d_model))
    grads = jax.jacrev(lambda e: model.apply(params, None, embeds=e).hidden[0].sum(-1))(embeds)[:, 0]
    return np.abs(np.asarray(grads)).max(-1) > 0


@pytest.mark.parametrize("windows,seen", [((3,), 5), ((3, 0), 9), ((2, 4), 5), ((), 9)])
def test_windows_limit_what_is_seen(windows, seen):
    """Two layers see as far as both windows together, less the position itself."""
    depends = reach(replace(LLAMA, windows=windows))
    ahead = np.arange(9)[:, None] - np.arange(9)[None, :]
    np.testing.assert_array_equal(depends, (ahead >= 0) & (ahead < seen))


def test_a_window_counts_places_in_its_own_segment():
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 0]])
    mask = np.asarray(attention.causal_mask(segments, 2))[0]
    expected = np.zeros((7, 7), bool)
    for i, j in [(0, 0), (1, 0), (1, 1), (2, 1), (2, 2), (3, 3), (4, 3), (4, 4), (5, 4), (5, 5), (6, 6)]:
        expected[i, j] = True
    np.testing.assert_array_equal(mask, expected)


def test_local_layers_have_their_own_unscaled_frequencies():
    frame = decoder.frame_of(GEMMA, (1, 4), None, None, None)
    plain = 10.0 ** (-2 * np.arange(3) / 6)
    np.testing.assert_allclose(frame.rotate[3].inverse, plain, rtol=1e-6)
    np.testing.assert_allclose(frame.rotate[0].inverse, 100.0 ** (-2 * np.arange(3) / 6) / 4, rtol=1e-6)


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones():
    scaling = RopeScaling("llama3", 8.0, 64, low_factor=1.0, high_factor=4.0)
    got = np.asarray(layers.frequencies(16, 1000.0, scaling).inverse)
    for i, value in enumerate(got):
        plain = 1000.0 ** (-2 * i / 16)
        wave = 2 * math.pi / plain
        if wave < 64 / 4:
            expected = plain
        elif wave > 64 / 1:
            expected = plain / 8
        else:
            smooth = (64 / wave - 1) / (4 - 1)
            expected = (1 - smooth) * plain / 8 + smooth * plain
        assert value == pytest.approx(expected, rel=1e-5)
    assert (got[:2] == 1000.0 ** (-2 * np.arange(2, dtype=np.float32) / 16)).all()


def test_yarn_blends_between_two_numbers_of_rotations_and_warms_attention():
    scaling = RopeScaling("yarn", 16.0, 256, beta_fast=32.0, beta_slow=1.0)
    found = layers.frequencies(32, 10_000.0, scaling)
    plain = 10_000.0 ** (-2 * np.arange(16) / 32)
    low, high = (32 * math.log(256 / (b * 2 * math.pi)) / (2 * math.log(10_000.0)) for b in (32.0, 1.0))
    ramp = np.clip((np.arange(16) - math.floor(low)) / (math.ceil(high) - math.floor(low)), 0, 1)
    np.testing.assert_allclose(found.inverse, plain / 16 * ramp + plain * (1 - ramp), rtol=1e-5)
    assert found.factor == pytest.approx(0.1 * math.log(16) + 1)
    same = replace(scaling, mscale=0.7, mscale_all_dim=0.7)
    assert layers.frequencies(32, 10_000.0, same).factor == 1


def test_latent_attention_caches_the_latent_not_the_heads():
    cache = decoder.make(DEEPSEEK).init_cache(3, 20)
    assert len(cache.layers) == 3
    for latent, key in cache.layers:
        assert latent.shape == (3, 1, 20, 8) and key.shape == (3, 1, 20, 4)


def test_mtp_predicts_further_tokens_from_the_tokens_between():
    """State k at position t depends on tokens up to t + k, and its loss is on the token after them."""
    model = decoder.make(DEEPSEEK)
    params = weights(model.specs)
    # embeddings as parameters: the gradient with respect to the table's rows tells which tokens were read
    tokens = jnp.arange(1, 8)[None, :]

    def at(table, k, t):
        p = {**params, "embed": {"tokens": table}}
        return model.apply(p, tokens, taps=("mtp",)).aux["mtp"][k, 0, t].sum()

    grads = fast_jit(jax.vmap(jax.grad(at), (None, 0, 0)))(params["embed"]["tokens"], jnp.array([0, 1, 0]), jnp.array([2, 2, 4]))
    read = np.abs(np.asarray(grads))[:, 1:8].max(-1) > 0
    np.testing.assert_array_equal(read, [[True] * 4 + [False] * 3, [True] * 5 + [False] * 2, [True] * 6 + [False]])


def test_mtp_loss_is_the_mean_cross_entropy_ahead():
    model = decoder.make(DEEPSEEK)
    params = weights(model.specs)
    batch = record([documents([6, 5]), documents([9], seed=2)], 12)
    batch = {k: jnp.asarray(v) for k, v in batch.items()}
    mean, metrics = fast_jit(lambda p: lm.loss(model, mtp=0.3)({"policy": p}, batch, None))(params)
    hidden = model.apply(params, batch["tokens"], segments=batch["segments"], taps=("mtp",)).aux["mtp"]
    total, count = 0.0, 0
    for k in (1, 2):
        logps = jax.nn.log_softmax(ops.logits(model.head(params), hidden[k - 1]), axis=-1)
        for row in range(2):
            for t in range(12 - k):
                if batch["mask"][row, t + k] and batch["segments"][row, t] == batch["segments"][row, t + k]:
                    total, count = total - float(logps[row, t, batch["targets"][row, t + k]]), count + 1
    assert float(metrics["mtp_loss"].count) == count == (3 + 4 + 7) + (2 + 3 + 6)
    assert float(metrics["mtp_loss"].value()) == pytest.approx(total / count, rel=1e-4)
    assert float(mean.value()) == pytest.approx(float(metrics["loss"].value()) + 0.3 * total / count, rel=1e-4)


def test_router_losses_are_added_with_their_weights():
    model = decoder.make(replace(DEEPSEEK, mtp_layers=0))
    params = weights(model.specs)
    batch = {k: jnp.asarray(v) for k, v in record([documents([6, 5]), documents([9], seed=2)], 12).items()}
    plain, metrics = lm.loss(model)({"policy": params}, batch, None)
    more, _ = lm.loss(model, router={"load_balance": 0.5, "router_z": 0.25})({"policy": params}, batch, None)
    aux = ops.forward(model, params, batch).aux["router"]
    assert aux["load"].shape == (2, 4)
    added = 0.5 * float(aux["load_balance"].mean()) + 0.25 * float(aux["router_z"].mean())
    assert float(more.value() - plain.value()) == pytest.approx(added, rel=1e-4)
    assert float(metrics["moe/load_max"].value()) >= 1
