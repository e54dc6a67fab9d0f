"""Mixture of experts against numpy, against every expert on every token, and spread over eight devices against one."""

import math
import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core import sharding, spec
from jaxllm.core.types import UserError
from jaxllm.models import experts, ffn, moe
from jaxllm.models.moe import MoEConfig
from tests.models.tiny import fast_jit, weights

D = 16
BASE = MoEConfig(n_experts=4, top_k=2, d_ff=8)
DEEPSEEK = MoEConfig(
    n_experts=8, top_k=3, d_ff=8, n_shared=2, scoring="sigmoid", scale=2.5, n_groups=4, topk_groups=2, group_score="top2",
    bias=True,
)  # fmt: skip


def inputs(c, kind="swiglu", b=4, length=6, seed=0):
    params = weights(spec.abstract(moe.specs(c, kind, D, 1.0)), seed)
    rng = np.random.default_rng(seed + 1)
    used = np.ones((b, length), bool)
    used[0, 4:], used[2] = False, False
    return params, jnp.asarray(rng.normal(size=(b, length, D)), jnp.float32), jnp.asarray(used)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def numpy_route(c, params, x):
    """The choice and the weights as the published implementations define them, one token at a time."""
    logits = np.asarray(x, np.float64) @ np.asarray(params["kernel"], np.float64)
    scores = softmax(logits) if c.scoring == "softmax" else 1 / (1 + np.exp(-logits))
    choice = scores + np.asarray(params.get("bias", np.zeros(c.n_experts)))[None, :]
    chosen, values = [], []
    for score, row in zip(scores, choice, strict=True):
        groups = row.reshape(c.n_groups, -1)
        best = groups.max(1) if c.group_score == "max" else np.sort(groups, axis=1)[:, -2:].sum(1)
        allowed = np.isin(np.arange(c.n_groups), np.argsort(-best)[: c.topk_groups]).repeat(groups.shape[1])
        top = np.argsort(-np.where(allowed | (c.n_groups == 1), row, -np.inf))[: c.top_k]
        w = score[top] / (score[top].sum() if c.normalise else 1)
        chosen.append(top)
        values.append(w * c.scale)
    return np.array(chosen), np.array(values), logits, scores


def every_expert(c, kind, params, x, routing, kept=None):
    """sum_k w_k expert_k(x), every expert computed on every token: differentiable."""
    flat = x.reshape(-1, D)
    gate = jnp.zeros((flat.shape[0], c.n_experts))
    w = routing.weights if kept is None else routing.weights * kept
    gate = gate.at[jnp.arange(flat.shape[0])[:, None], routing.experts].set(w)
    each = jax.vmap(lambda p: ffn.apply(p, flat[None], kind)[0])(params["experts"])
    y = jnp.einsum("etd,te->td", each, gate).reshape(x.shape)
    return y + ffn.apply(params["shared"], x, kind) if "shared" in params else y


def reference(c, kind, params, x, used):
    routing = moe.route(c, params["router"], x.reshape(-1, D))
    mask = used.reshape(-1, 1).astype(jnp.float32)
    return every_expert(c, kind, params, x, routing, kept=mask)


VARIANTS = {
    "mixtral": BASE,
    "qwen3": replace(BASE, normalise=False),
    "switch": replace(BASE, top_k=1, normalise=False),
    "deepseek_v2": replace(BASE, n_experts=8, n_groups=4, topk_groups=2, normalise=False, scale=16.0),
    "deepseek_v3": DEEPSEEK,
}


@pytest.mark.parametrize("name", VARIANTS)
def test_routing_is_the_published_one(name):
    c = VARIANTS[name]
    params, x, _ = inputs(c, b=8)
    x = x.reshape(-1, D)
    routing = moe.route(c, params["router"], x)
    chosen, values, logits, scores = numpy_route(c, params["router"], x)
    np.testing.assert_array_equal(routing.experts, chosen)
    np.testing.assert_allclose(routing.weights, values, rtol=1e-5)
    np.testing.assert_allclose(routing.logits, logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(routing.probabilities, scores / scores.sum(-1, keepdims=True), rtol=1e-5)


def test_groups_and_bias_change_the_choice_and_only_the_choice():
    params, x, _ = inputs(DEEPSEEK, b=8)
    x, router = x.reshape(-1, D), params["router"]
    full = moe.route(DEEPSEEK, router, x)
    free = moe.route(replace(DEEPSEEK, n_groups=1, topk_groups=1), router, x)
    unbiased = moe.route(DEEPSEEK, {**router, "bias": jnp.zeros(8)}, x)
    assert (full.experts != free.experts).any() and (full.experts != unbiased.experts).any()
    scores = jnp.take_along_axis(jax.nn.sigmoid(full.logits), full.experts, axis=1)
    np.testing.assert_allclose(full.weights, 2.5 * scores / scores.sum(1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize("name,kind", [("mixtral", "swiglu"), ("switch", "gelu"), ("deepseek_v3", "swiglu")])
def test_dropless_is_every_expert_on_every_token_with_its_gradients(name, kind):
    c = VARIANTS[name]
    params, x, used = inputs(c, kind)

    def ours(params, x):
        return moe.apply(params, c, kind, x, used)[0]

    def theirs(params, x):
        return reference(c, kind, params, x, used)

    probe = jnp.asarray(np.random.default_rng(9).normal(size=x.shape), jnp.float32)
    values = [
        fast_jit(jax.value_and_grad(lambda p, x, f=f: jnp.sum(f(p, x) * probe), argnums=(0, 1)))(params, x)
        for f in (ours, theirs)
    ]
    np.testing.assert_allclose(ours(params, x), theirs(params, x), rtol=1e-4, atol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), *(v[1] for v in values))
    assert float(jnp.abs(values[0][1][0]["router"]["kernel"]).max()) > 0


@pytest.mark.parametrize("size", [None, 3, 64])
def test_blocks_and_ragged_compute_the_same(size):
    rng = np.random.default_rng(0)
    kernels = weights(spec.abstract(moe.specs(BASE, "swiglu", D, 1.0)["experts"]))
    rows = jnp.asarray(rng.normal(size=(20, D)), jnp.float32)
    for slots in (rng.integers(0, 5, 40), np.full(40, 2), np.full(40, 4), np.sort(rng.integers(0, 4, 40))):
        slots = jnp.asarray(slots)

        def through(grouping, kernels, rows, slots=slots):
            layout, product = grouping(slots, 4)
            return experts.put_back(experts.network(kernels, "swiglu", experts.take(rows, layout, 2), product), layout)

        pair = [jax.vjp(partial(through, g), kernels, rows) for g in (partial(experts.blocks, size=size), experts.ragged)]
        np.testing.assert_allclose(pair[0][0], pair[1][0], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(np.abs(pair[0][0]).sum(1) == 0, slots == 4)
        grads = [vjp(jnp.ones((40, D))) for _, vjp in pair]
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), *grads)


@pytest.mark.parametrize("factor", [None, 1.25])
def test_no_buffer_of_tokens_times_experts_times_width(factor):
    c = MoEConfig(n_experts=32, top_k=2, d_ff=8, capacity_factor=factor)
    params, x, used = inputs(c, b=8, length=32)
    run = fast_jit(jax.grad(lambda p, x: jnp.sum(moe.apply(p, c, "swiglu", x, used)[0] ** 2), argnums=(0, 1)))
    text = run.lower(params, x).compile().as_text()
    largest = max(math.prod(map(int, dims.split(","))) for dims in re.findall(r"[fs]32\[([\d,]+)\]", text))
    assert 8 * 32 * 2 * D <= largest < 8 * 32 * 32 * D // 4  # slots x width, and far below


def test_capacity_drops_exactly_the_later_tokens():
    c = replace(BASE, capacity_factor=0.7)
    params, x, used = inputs(c)
    y, aux = moe.apply(params, c, "swiglu", x, used)
    routing = moe.route(c, params["router"], x.reshape(-1, D))
    room = dict.fromkeys(range(4), int(np.ceil(0.7 * 24 * 2 / 4)))
    kept = np.zeros(routing.experts.shape)
    for t, row in enumerate(np.asarray(routing.experts)):
        for j, e in enumerate(row):
            if used.reshape(-1)[t] and room[int(e)] > 0:
                kept[t, j], room[int(e)] = 1, room[int(e)] - 1
    np.testing.assert_allclose(y, every_expert(c, "swiglu", params, x, routing, kept=kept), rtol=1e-4, atol=1e-5)
    slots = 2 * int(used.sum())
    assert 0 < kept.sum() < slots
    assert float(aux["drops"]) == pytest.approx(1 - kept.sum() / slots)


def test_a_dropped_token_has_no_output_and_a_large_capacity_is_dropless():
    c = replace(BASE, top_k=1, normalise=False, capacity_factor=0.01)  # one slot per expert
    params, x, used = inputs(c)
    y, _ = moe.apply(params, c, "swiglu", x, used)
    assert int((jnp.abs(y).sum(-1) > 0).sum()) <= 4
    plain, whole = (moe.apply(params, replace(BASE, capacity_factor=f), "swiglu", x, used) for f in (None, 2.0))
    np.testing.assert_allclose(plain[0], whole[0], rtol=1e-4, atol=1e-5)
    assert float(plain[1]["drops"]) == float(whole[1]["drops"]) == 0


def test_padding_takes_no_capacity_and_is_not_counted():
    c = replace(BASE, capacity_factor=0.5)
    params, x, used = inputs(c)
    other = jnp.where(used[..., None], x, 7.0)
    (y, aux), (z, changed) = (moe.apply(params, c, "swiglu", v, used) for v in (x, other))
    assert float(aux["drops"]) > 0
    np.testing.assert_array_equal(y, z)
    assert not np.asarray(y)[~np.asarray(used)].any()
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), aux, changed)


def test_nothing_used_is_no_nan():
    params, x, used = inputs(DEEPSEEK)
    grads = jax.grad(lambda p: sum(v.sum() for v in moe.apply(p, DEEPSEEK, "swiglu", x, used & False)[1].values()))(params)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_losses_and_statistics_are_those_of_numpy(name):
    c = VARIANTS[name]
    params, x, used = inputs(c)
    aux = moe.apply(params, c, "swiglu", x, used)[1]
    chosen, _, logits, scores = numpy_route(c, params["router"], np.asarray(x)[np.asarray(used)])
    p = scores / scores.sum(-1, keepdims=True)
    load = np.bincount(chosen.reshape(-1), minlength=c.n_experts) / chosen.size
    np.testing.assert_allclose(aux["load"], load, rtol=1e-6)
    assert float(aux["load_balance"]) == pytest.approx(c.n_experts * (load * p.mean(0)).sum(), rel=1e-5)
    lse = np.log(np.exp(logits).sum(-1))
    assert float(aux["router_z"]) == pytest.approx((lse**2).mean(), rel=1e-4)
    assert float(aux["router_entropy"]) == pytest.approx(-(p * np.log(p)).sum(-1).mean(), rel=1e-4)
    assert float(aux["drops"]) == 0


def test_balance_is_one_when_balanced_and_its_gradient_lowers_the_busy_expert():
    c = replace(BASE, n_experts=2, top_k=1, normalise=False)
    kernel = jnp.zeros((D, 2)).at[0].set(jnp.array([4.0, -4.0]))
    x = jnp.zeros((1, 4, D)).at[0, :, 0].set(jnp.array([1.0, -1.0, 1.0, -1.0]))
    params = inputs(c)[0]

    def balance(kernel, x):
        return moe.apply({**params, "router": {"kernel": kernel}}, c, "swiglu", x, jnp.ones(x.shape[:2], bool))[1]["load_balance"]

    assert float(balance(kernel, x)) == pytest.approx(1, abs=1e-5)
    busy = jnp.abs(x)  # every token to expert 0
    assert float(balance(kernel, busy)) == pytest.approx(2, abs=1e-2)
    grad = jax.grad(balance)(kernel * 0.1, busy)
    assert float(grad[0, 0]) > 0 > float(grad[0, 1])


def test_bias_step_is_zero_and_its_gradient_the_sign_of_the_surplus():
    params, x, used = inputs(DEEPSEEK)

    def run(params):
        aux = moe.apply(params, DEEPSEEK, "swiglu", x, used)[1]
        return aux["bias_step"], aux["load"]

    (value, load), grads = jax.value_and_grad(run, has_aux=True)(params)
    assert float(value) == 0
    np.testing.assert_array_equal(grads["router"]["bias"], np.sign(np.asarray(load) - 1 / 8))
    assert not any(bool(jnp.any(g)) for g in jax.tree.leaves({**grads, "router": grads["router"]["kernel"]}))
    y_grad = jax.grad(lambda p: jnp.sum(moe.apply(p, DEEPSEEK, "swiglu", x, used)[0] ** 2))(params)
    assert not bool(jnp.any(y_grad["router"]["bias"]))


def test_repeated_bias_steps_balance_the_load():
    c = replace(DEEPSEEK, n_groups=1, topk_groups=1, n_shared=0)
    params, x, used = inputs(c, b=32)

    def load(bias):
        router = {**params["router"], "bias": bias}
        return moe.apply({**params, "router": router}, c, "swiglu", x, used)[1]

    step = fast_jit(lambda bias: bias - 0.02 * jax.grad(lambda b: load(b)["bias_step"])(bias))
    bias = jnp.zeros(8)
    before = load(bias)["load"]
    for _ in range(60):
        bias = step(bias)
    after = load(bias)["load"]
    assert float(after.max()) < 1.25 / 8 < float(before.max())


MESHES = [
    {"expert": 2},
    {"expert": 4},
    {"data": 2, "expert": 2},
    {"fsdp": 2, "expert": 2},
    {"data": 2, "tensor": 2, "expert": 2},
    {"data": 4},
    {"context": 2, "expert": 2},
    {"fsdp": 2, "context": 2, "expert": 2},
    {"context": 2, "tensor": 2},
]


def total(c, kind, params, x, used, probe):
    y, aux = moe.apply(params, c, kind, x, used)
    losses = aux["load_balance"] + 0.1 * aux["router_z"] + aux["bias_step"]
    return jnp.sum(y * probe) + losses, (y, aux)


@pytest.mark.parametrize("sizes", MESHES, ids=lambda s: "x".join(f"{k}{v}" for k, v in s.items()))
def test_spread_over_devices_equals_one_device_with_its_gradients(sizes):
    c, kind = replace(DEEPSEEK, top_k=2), "swiglu"
    params, x, used = inputs(c)
    probe = jnp.asarray(np.random.default_rng(9).normal(size=x.shape), jnp.float32)
    grad = jax.value_and_grad(partial(total, c, kind), argnums=(0, 1), has_aux=True)
    alone = fast_jit(grad)(params, x, used, probe)
    mesh = sharding.make_mesh(sizes)
    with sharding.use(mesh):
        placed = jax.device_put(params, spec.shardings(moe.specs(c, kind, D, 1.0), mesh, sharding.RULES))
        spread = jax.block_until_ready(fast_jit(grad)(placed, *sharding.put_batch((x, used, probe), mesh)))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4), alone, spread)


def test_experts_are_never_gathered_over_their_axis():
    c = replace(BASE, n_experts=8, d_ff=24)
    mesh = sharding.make_mesh({"data": 2, "expert": 4})
    params, x, used = inputs(c)
    with sharding.use(mesh):
        placed = jax.device_put(params, spec.shardings(moe.specs(c, "swiglu", D, 1.0), mesh, sharding.RULES))
        run = fast_jit(lambda p, x, u: moe.apply(p, c, "swiglu", x, u)[0])
        text = run.lower(placed, *sharding.put_batch((x, used), mesh)).compile().as_text()
    assert "all-to-all" in text
    assert "f32[2,16,24]" in text and "f32[8,16,24]" not in text


def test_on_a_mesh_capacity_holds_for_each_devices_tokens():
    c = replace(BASE, n_experts=4, capacity_factor=0.5)
    params, x, used = inputs(c)
    mesh = sharding.make_mesh({"data": 2, "expert": 2})
    with sharding.use(mesh):
        placed = jax.device_put(params, spec.shardings(moe.specs(c, "swiglu", D, 1.0), mesh, sharding.RULES))
        run = fast_jit(lambda p, x, u: moe.apply(p, c, "swiglu", x, u))
        y, aux = jax.block_until_ready(run(placed, *sharding.put_batch((x, used), mesh)))
    parts = [
        moe.apply(params, c, "swiglu", jnp.asarray(a), jnp.asarray(b))
        for a, b in zip(
            np.split(np.asarray(x).reshape(1, 24, D), 4, axis=1),
            np.split(np.asarray(used).reshape(1, 24), 4, axis=1),
            strict=True,
        )
    ]
    np.testing.assert_allclose(
        np.asarray(y).reshape(1, 24, D), np.concatenate([p[0] for p in parts], axis=1), rtol=1e-4, atol=1e-5
    )
    dropped = sum(float(p[1]["drops"]) * n for p, n in zip(parts, np.asarray(used).reshape(4, 6).sum(1), strict=True))
    assert 0 < float(aux["drops"]) == pytest.approx(dropped / int(used.sum()), rel=1e-5)


def test_what_does_not_divide_is_said():
    params, x, used = inputs(BASE)
    with (
        sharding.use(sharding.make_mesh({"expert": 8})),
        pytest.raises(UserError, match="mesh.expert=8 does not divide.*n_experts=4"),
    ):
        moe.apply(params, BASE, "swiglu", x, used)
    with sharding.use(sharding.make_mesh({"expert": 4})), pytest.raises(UserError, match="6 tokens.*do not divide.*4"):
        moe.apply(params, BASE, "swiglu", x[:1], used[:1])


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"scoring": "relu"}, "scoring='relu'.*softmax, sigmoid"),
        ({"top_k": 5}, "top_k=5 is more than the 4 experts"),
        ({"n_groups": 3}, "n_groups=3 does not divide.*n_experts=4"),
        ({"n_groups": 4, "topk_groups": 1}, "top_k=2 is more than the 1 experts"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0"),
    ],
)
def test_configs_that_cannot_be_built_are_said(changes, message):
    with pytest.raises(UserError, match=message):
        moe.validate(replace(BASE, **changes))
