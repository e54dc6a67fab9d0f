"""Next-token loss against numpy."""

import jax
import numpy as np

from jaxllm.data import chat, pack
from jaxllm.data.tokenizer import byte_tokenizer
from jaxllm.losses import lm
from tests.losses import bigram

LOSS = jax.jit(lm.loss(bigram.MODEL, chunk=10))
KEY = jax.random.key(0)


def test_loss_and_accuracy_equal_numpy():
    params, record = bigram.params(), bigram.record(5, 6)
    mean, metrics = LOSS({"policy": params}, record, KEY)
    mask = record["mask"]
    np.testing.assert_allclose(mean.value(), -bigram.logps(params, record)[mask].mean(), rtol=1e-5)
    assert mean.count == mask.sum() and set(metrics) == {"loss", "mean_token_accuracy"}
    hits = bigram.table(params).argmax(-1)[record["tokens"]] == record["targets"]
    np.testing.assert_allclose(metrics["mean_token_accuracy"].value(), hits[mask].mean(), rtol=1e-6)


def test_masked_equals_dropped():
    params, record = bigram.params(), bigram.record(5, 6)
    record["mask"][2:] = False
    dropped = {k: v[:2] for k, v in record.items()}
    grad = jax.jit(jax.grad(lambda p, r: LOSS({"policy": p}, r, KEY)[0].value()))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        grad(params, record),
        grad(params, dropped),
    )


def test_labels_of_the_prompt_reach_neither_the_loss_nor_a_gradient():
    """A conversation as training sees it: to the bit, whatever stands as a label where nothing is trained."""
    tokenizer = byte_tokenizer()
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    record, report = pack.pack([chat.encode_chat(tokenizer, messages)] * 3, 12)
    assert report["trained_tokens"] == record["mask"].sum() == 3 * len([*"yo", "<|end|>"])
    record |= {name: record[name] % bigram.V for name in ("tokens", "targets")}
    other = record | {"targets": np.where(record["mask"], record["targets"], (record["targets"] + 5) % bigram.V)}
    assert (other["targets"] != record["targets"]).sum() == (~record["mask"]).sum() > 0
    both = jax.jit(jax.value_and_grad(lambda p, r: LOSS({"policy": p}, r, KEY)[0].value()))
    jax.tree.map(np.testing.assert_array_equal, both(bigram.params(), record), both(bigram.params(), other))


def test_an_empty_mask_gives_zero_and_finite_gradients():
    params, record = bigram.params(), bigram.record(2, 4)
    record["mask"][:] = False
    value, grads = jax.value_and_grad(lambda p: LOSS({"policy": p}, record, KEY)[0].value())(params)
    assert value == 0 and all(not np.asarray(g).any() for g in jax.tree.leaves(grads))


def test_gradients_are_finite_for_impossible_targets():
    params, record = bigram.params(), bigram.record(3, 5)
    params["kernel"] = params["kernel"] * 3e3  # log-probabilities of about -1e4
    value, grads = jax.value_and_grad(lambda p: LOSS({"policy": p}, record, KEY)[0].value())(params)
    assert value > 1e3 and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
