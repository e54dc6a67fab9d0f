"""Every objective on every kind of mesh equals one device: loss and gradients."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from jaxllm.adapt import lora
from jaxllm.core import sharding, spec
from jaxllm.core.tree import flatten
from jaxllm.losses import lm, mlm, policy, preference
from jaxllm.models import decoder, encdec, encoder
from jaxllm.models.moe import MoEConfig
from tests.models.test_encdec import pairs_record
from tests.models.tiny import documents, fast_jit, weights
from tests.train.setups import LENGTH, MODEL, OBJECTIVES, ROWS, group_batch, lm_batch, pair_batch, setup

KEY = jax.random.key(0)
MESHES = {
    "data2-fsdp2-context2": ({"data": 2, "fsdp": 2, "context": 2}, ""),
    "fsdp2-tensor2-context2": ({"fsdp": 2, "tensor": 2, "context": 2}, ""),
    "sequence-parallel": ({"fsdp": 2, "tensor": 2, "context": 2}, "residual=context+tensor"),
    "fsdp2-context4": ({"fsdp": 2, "context": 4}, ""),
}
SPARSE = decoder.make(replace(MODEL.config, moe=MoEConfig(4, 2, 16)))
ADAPTED = lora.with_lora(MODEL, rank=2, alpha=4.0, match="attention/(q|k|v|o)/kernel|ffn/(gate|up|down)/kernel")
T5 = encdec.make(encdec.EncDecConfig(vocab_size=50, d_model=16, n_layers=1, n_heads=4, head_dim=4, d_ff=32, unroll=True))
BERT = encoder.make(encoder.EncoderConfig(vocab_size=50, max_length=16, d_model=16, n_layers=1, n_heads=4, d_ff=32, unroll=True))


def t5_batch():
    texts = documents([LENGTH - 1] * ROWS + [5] * ROWS)
    return pairs_record([[pair] for pair in zip(texts[:ROWS], texts[ROWS:], strict=True)], (LENGTH, LENGTH))


def mlm_batch():
    batch = lm_batch()
    chosen = batch["mask"] & (batch["tokens"] % 2 == 0)
    return {"tokens": batch["tokens"], "segments": batch["segments"], "chosen": chosen}


def masked(key, batch):
    return jax.numpy.where(batch["chosen"], 3, batch["tokens"]), batch["chosen"]


MORE = {
    "moe": (lm.loss(SPARSE, router={"load_balance": 0.1, "router_z": 0.1}, chunk=16), SPARSE, lm_batch),
    "t5": (lm.loss(T5, chunk=16), T5, t5_batch),
    "mlm": (mlm.loss(BERT, masked, chunk=16), BERT, mlm_batch),
    "lora-lm": (lm.loss(ADAPTED, chunk=16), ADAPTED, lm_batch),
    "lora-dpo": (preference.loss(ADAPTED, preference.dpo, beta=0.1, chunk=16), ADAPTED, pair_batch),
    "lora-grpo": (
        policy.group_loss(ADAPTED, partial(policy.clipped, low=0.2, high=0.2), chunk=16), ADAPTED,
        partial(group_batch, policy.sequence_mean),
    ),
}  # fmt: skip


def made(name):
    """(loss_fn, specs, params, batch) of an objective."""
    if name in OBJECTIVES:
        return setup(name)
    loss_fn, model, batch = MORE[name]
    specs = {"policy": model.specs}
    return loss_fn, specs, weights(specs), batch()


def check(name, sizes, rules=""):
    """One device and the mesh agree; the gradients lie like the parameters."""
    loss_fn, specs, params, batch = made(name)

    def value_and_grad(params, batch):
        return jax.value_and_grad(lambda p: loss_fn(p, batch, KEY)[0].value())(params)

    expected = fast_jit(value_and_grad)(params, batch)
    mesh = sharding.make_mesh(sizes)
    with sharding.use(mesh, sharding.make_rules(rules)):
        where = spec.shardings(specs, mesh, sharding.current_rules())
        placed, split = jax.device_put(params, where), sharding.put_batch(batch, mesh)
        got = jax.block_until_ready(fast_jit(value_and_grad, out_shardings=(None, where))(placed, split))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    for path, want in flatten(expected[1]).items():
        np.testing.assert_allclose(flatten(got[1])[path], want, rtol=1e-4, atol=5e-6, err_msg=path)


@pytest.mark.parametrize("mesh", list(MESHES))
def test_next_token_prediction(mesh):
    check("lm", *MESHES[mesh])


@pytest.mark.parametrize("name", ["reward", "dpo", "ppo", "grpo", "t5", "mlm", "lora-lm"])
def test_other_objectives_with_the_length_split(name):
    check(name, *MESHES["fsdp2-tensor2-context2"])


@pytest.mark.parametrize("name", ["dpo", "t5", "lora-grpo"])
def test_other_objectives_with_sequence_parallelism(name):
    check(name, *MESHES["sequence-parallel"])


@pytest.mark.parametrize(
    "sizes", [{"data": 2, "expert": 2, "context": 2}, {"tensor": 2, "expert": 2, "context": 2}, {"fsdp": 4, "expert": 2}],
    ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()),
)  # fmt: skip
def test_a_mixture_of_experts(sizes):
    check("moe", sizes)


def test_adapters_over_data_and_tensor():
    check("lora-dpo", {"data": 2, "fsdp": 2, "tensor": 2})


def test_the_length_of_a_batch_is_split():
    """Otherwise the tests above would show nothing about `context`."""
    mesh = sharding.make_mesh({"fsdp": 2, "context": 4})
    with sharding.use(mesh):
        batch = sharding.put_batch(lm_batch(), mesh)
    assert batch["tokens"].addressable_shards[0].data.shape == (ROWS // 2, LENGTH // 4)
