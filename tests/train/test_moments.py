"""Every optimizer's state on a mesh: where it lies, that a step equals one device's, and what it is kept in."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import common, optimizers
from jaxllm.core import sharding
from jaxllm.core.types import UserError
from jaxllm.losses import lm
from jaxllm.models import decoder
from jaxllm.models.decoder import DecoderConfig
from jaxllm.train import moments, optim
from jaxllm.train.checkpoint import open_checkpoints
from jaxllm.train.step import make_train_step
from tests.models.tiny import documents, fast_jit, record

MODEL = decoder.make(
    DecoderConfig(vocab_size=50, max_length=16, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=32, tied=False)
)
BATCH = record([[d] for d in documents([13, 9, 12, 13, 8, 11, 13, 10])], 12)
FLAT = optax.constant_schedule(1e-2)
SETTINGS = SimpleNamespace(b1=0.9, b2=0.95, weight_decay=0.1, clip_norm=1.0)
TXS = {
    "adamw": optimizers.adamw(FLAT, SETTINGS),
    "adafactor": optim.adafactor(FLAT, smallest=8),  # so that small parameters are factored
    "muon": optimizers.muon(FLAT, SETTINGS),
}
TXS["bfloat16"] = moments.stored(TXS["adamw"], "bfloat16")
CUBE = {"data": 2, "fsdp": 2, "tensor": 2}


def start(tx, sizes):
    mesh = sharding.make_mesh(sizes)
    with sharding.use(mesh):
        return mesh, common.new_state({"policy": common.born_sharded(MODEL.specs, 0, mesh)}, tx, mesh)


def steps(tx, sizes, n=2):
    """The state after n steps."""
    mesh, (state, frozen) = start(tx, sizes)
    with sharding.use(mesh):
        where = jax.tree.map(lambda x: x.sharding, state)
        step = fast_jit(make_train_step(lm.loss(MODEL), tx), donate_argnums=0, out_shardings=(where, None))
        batch = sharding.put_batch(BATCH, mesh)
        for _ in range(n):
            state, _ = jax.block_until_ready(step(state, frozen, batch, jax.random.key(0)))
    return state


def lying(state):
    """{(field, shape of the parameter, of the moment): (its spec, the parameter's)} of the moments."""
    found = {}

    def one(field, leaf, p):
        found.setdefault((field, p.shape, leaf.shape), []).append((leaf.sharding.spec, p.sharding.spec))
        return leaf

    moments.map_moments(one, state.opt_state, state.params)
    return found


@pytest.mark.parametrize("name", TXS)
def test_moments_lie_like_their_parameters(name):
    _, (state, _) = start(TXS[name], CUBE)
    found = lying(state)
    same = [specs for (_, p, m), all_specs in found.items() if p == m for specs in all_specs]
    assert same and all(mine == theirs for mine, theirs in same)
    assert any(mine != jax.sharding.PartitionSpec() for mine, _ in same) or name == "adafactor"
    split = jax.tree.leaves(jax.tree.map(lambda x: x.addressable_shards[0].data.size < x.size, state.opt_state))
    assert any(split), "nothing is split over the mesh"
    owned = sum(len(x) for x in found.values())
    others = [x for x in jax.tree.leaves(state.opt_state) if x.ndim == 0]
    assert owned + len(others) >= len(jax.tree.leaves(state.opt_state)) - 1  # Muon's coefficients belong to no parameter


def test_factored_moments_keep_the_dimensions_that_they_keep():
    _, (state, _) = start(TXS["adafactor"], CUBE)
    found = lying(state)
    up = (2, 16, 32)  # layers, embed over fsdp, mlp over tensor
    P = jax.sharding.PartitionSpec
    assert {m for f, p, m in found if p == up and f != "v"} == {(2, 16), (2, 32)}
    assert found["v_row", up, (2, 16)][0][0] == P(None, ("fsdp",))
    assert found["v_col", up, (2, 32)][0][0] == P(None, ("tensor",))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_a_step_on_a_mesh_equals_one_device(name):
    one, many = steps(TXS[name], {}), steps(TXS[name], CUBE)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-5)
    assert int(many.step) == 2


@pytest.mark.parametrize("name", ["adafactor", "muon", "bfloat16"])
def test_a_state_survives_a_checkpoint(name, tmp_path):
    """Saved after two steps and restored into a fresh state: the next two end in the same bits as four without a stop."""
    tx = TXS[name]
    mesh, (state, frozen) = start(tx, {"fsdp": 2})
    with sharding.use(mesh):
        step = common.jit_step(lm.loss(MODEL), tx, state, 1)
        batch = sharding.put_batch(BATCH, mesh)
        advance = lambda s: jax.block_until_ready(step(s, frozen, batch, jax.random.key(0)))[0]  # noqa: E731
        state = advance(advance(state))
        store = open_checkpoints(tmp_path)
        store.save(state, {}, {})
        store.close()
        state = advance(advance(state))
        fresh = start(tx, {"fsdp": 2})[1][0]
        store = open_checkpoints(tmp_path)
        restored = store.restore(fresh)[0]
        store.close()
        for a, b in zip(jax.tree.leaves(fresh), jax.tree.leaves(restored), strict=True):
            assert a.dtype == b.dtype and a.sharding == b.sharding
        restored = advance(advance(restored))
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


PARAMS = {"a": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}


def test_bfloat16_moments_are_bfloat16_and_parameters_are_not():
    tx = TXS["bfloat16"]
    state = jax.jit(tx.init)(PARAMS)
    updates, state = jax.jit(tx.update)(PARAMS, state, PARAMS)
    kinds = []
    moments.map_moments(lambda field, m, _: kinds.append((field, str(m.dtype))), state, PARAMS)
    assert sorted(set(kinds)) == [("mu", "bfloat16"), ("nu", "bfloat16")] and len(kinds) == 4
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("float32")}
    counts = [x for x in jax.tree.leaves(state) if x.ndim == 0]
    assert counts and all(x.dtype == jnp.int32 and int(x) == 1 for x in counts)


@partial(jax.jit, static_argnums=0)
def after_a_spike(b2):
    """The second moment 400 steps after one gradient of 1, then gradients of 0.01, in both precisions, over its true value."""
    out = []
    for dtype in ("float32", "bfloat16"):
        tx = moments.stored(optim.adamw(0.0, b2=b2, clip_norm=1e9), dtype)
        params = {"a": {"kernel": jnp.zeros(1)}}

        def body(state, g, tx=tx, params=params):
            return tx.update({"a": {"kernel": g.reshape(1)}}, state, params)[1], None

        state = jax.lax.scan(body, tx.init(params), jnp.full(400, 0.01).at[0].set(1.0))[0]
        out.append(optax.tree.get(state, "nu")["a"]["kernel"][0].astype(jnp.float32))
    return out


def test_a_second_moment_falls_in_bfloat16_at_small_b2_alone():
    """Why moments=bfloat16 refuses b2 above 0.99: the moment of a spike never falls."""
    wide, narrow = after_a_spike(0.95)
    assert narrow == pytest.approx(float(wide), rel=0.1)
    wide, narrow = after_a_spike(0.999)
    assert narrow == pytest.approx(1e-3, rel=0.01) and wide < 0.8 * narrow
    with pytest.raises(UserError, match=r"bfloat16 with optim.b2=0.999"):
        moments.check_b2("bfloat16", 0.999)
    moments.check_b2("bfloat16", 0.95)
    moments.check_b2("float32", 0.999)


def test_offloaded_moments_stay_on_the_host_and_change_nothing():
    tx = moments.offloaded(TXS["adamw"])
    plain, state = steps(TXS["adamw"], {"fsdp": 2}), steps(tx, {"fsdp": 2})
    kinds = []
    moments.map_moments(lambda _, m, p: kinds.append((m.sharding.memory_kind, m.sharding.spec == p.sharding.spec)),
                        state.opt_state, state.params)  # fmt: skip
    assert set(kinds) == {("pinned_host", True)}
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state.params)} == {"device"}
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_no_host_memory_is_said(monkeypatch):
    device = SimpleNamespace(addressable_memories=lambda: [SimpleNamespace(kind="device")])
    monkeypatch.setattr(jax, "devices", lambda: [device])
    with pytest.raises(UserError, match="optim.offload=True: .* no pinned_host memory, only device"):
        moments.offloaded(TXS["adamw"])
