"""dtype=bfloat16 on the train step's program: products in bfloat16; softmax, norms, losses, parameters and moments in float32."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.core import ops, spec
from jaxllm.losses import lm, policy, preference
from jaxllm.models import decoder, encdec
from jaxllm.train import optim
from jaxllm.train.step import init_state, make_train_step
from tests.models.tiny import DEEPSEEK, GEMMA, LLAMA

ROWS, LENGTH = 2, 20


def arrays(*shape, **dtypes):
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in dtypes.items()}


RECORD = arrays(ROWS, LENGTH, tokens=jnp.int32, targets=jnp.int32, segments=jnp.int32, mask=bool)
PAIR = {"chosen": RECORD, "rejected": RECORD} | arrays(ROWS, ref_chosen_logps=jnp.float32, ref_rejected_logps=jnp.float32)
GROUP = RECORD | arrays(ROWS, LENGTH, logps_old=jnp.float32, ref_logps=jnp.float32, weights=jnp.float32, advantages=jnp.float32)
T5 = encdec.EncDecConfig(vocab_size=50, max_length=32, d_model=16, n_layers=1, n_heads=2, d_ff=24, dtype="bfloat16")
clipped = partial(policy.clipped, low=0.2, high=0.2)
half = lambda c: decoder.make(replace(c, dtype="bfloat16"))  # noqa: E731
CASES = {
    "llama": (half(LLAMA), lm.loss, RECORD),
    "remat": (half(replace(LLAMA, remat="full")), lm.loss, RECORD),
    "gemma": (half(replace(GEMMA, n_layers=2, windows=(3, 0))), lm.loss, RECORD),
    "deepseek": (
        half(replace(DEEPSEEK, n_layers=2, mtp_layers=1)),
        partial(lm.loss, mtp=0.1, router={"load_balance": 0.01}),
        RECORD,
    ),
    "t5": (encdec.make(T5), lm.loss, RECORD | {"inputs": arrays(ROWS, LENGTH, tokens=jnp.int32, segments=jnp.int32)}),
    "dpo": (half(LLAMA), lambda m: preference.loss(m, preference.dpo, beta=0.1, nll_weight=0.1, chunk=16), PAIR),
    "grpo": (half(LLAMA), lambda m: policy.group_loss(m, clipped, kl=policy.k3, kl_coef=0.1, chunk=16), GROUP),
}


def watching(tx, seen):
    """tx, writing down the dtypes of the gradients that it is given."""

    def update(grads, state, params=None):
        seen.update(str(g.dtype) for g in jax.tree.leaves(grads))
        return tx.update(grads, state, params)

    return optax.GradientTransformation(tx.init, update)


@pytest.fixture(scope="module", params=CASES)
def program(request):
    """(name, the step's StableHLO before any backend changes a type, the new state's shapes, dtypes of the gradients)."""
    model, build, batch = CASES[request.param]
    seen = set()
    tx = watching(optim.adamw(1e-3), seen)
    state, frozen = jax.eval_shape(lambda: init_state(spec.init({"policy": model.specs}, jax.random.key(0)), tx))
    step = make_train_step(build(model), tx)
    key = jax.eval_shape(lambda: jax.random.key(0))
    new, _ = jax.eval_shape(step, state, frozen, batch, key)
    return request.param, jax.jit(step).lower(state, frozen, batch, key).as_text(), new, seen


def products(text):
    """(shape and type of both operands) of every matrix product."""
    found = re.findall(r"stablehlo\.dot_general .*: \(tensor<(\S+)>, tensor<(\S+)>\) ->", text)
    assert len(found) > 10, "no products found: has the text changed?"
    return found


def is_router(operands):
    """DeepSeek's 4 experts score the 16 wide states of all tokens; the tokens of each expert are counted."""
    n = ROWS * LENGTH
    return {tuple(map(int, x.split("x")[:-1])) for x in operands} <= {(n, 16), (16, 4), (n, 4), (n,), (4,), (4, 16)}


def test_products_are_of_bfloat16(program):
    name, text, _, _ = program
    wide = [pair for pair in products(text) if any(x.endswith("f32") for x in pair)]
    wide = [pair for pair in wide if name != "deepseek" or not is_router(pair)]
    assert not wide, wide


def test_exponentials_norms_and_logs_are_of_float32(program):
    """But for the exponential of a swiglu's gate, whose last dimension is a feed-forward network's width."""
    _, text, _, _ = program
    for op, least, gates in (("exponential", 2, (24, 8)), ("rsqrt", 2, ()), ("log", 1, ())):
        found = re.findall(rf"stablehlo\.{op} .*: tensor<(\S+)>", text)
        narrow = [t for t in found if not t.endswith("f32") and int(t.split("x")[-2]) not in gates]
        assert len(found) >= least and not narrow, (op, narrow)


def test_parameters_gradients_and_moments_are_float32(program):
    _, _, state, seen = program
    assert seen == {"float32"}
    floats = {x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert floats == {jnp.dtype("float32")}


def test_a_float32_model_has_no_bfloat16():
    """The search above can fail."""
    model = decoder.make(LLAMA)
    params = {"policy": spec.abstract(model.specs)}
    text = jax.jit(jax.grad(lambda p, b: lm.loss(model)(p, b, None)[0].total)).lower(params, RECORD).as_text()
    assert all(x.endswith("f32") for pair in products(text) for x in pair)


def test_product_equals_einsum_and_rounds_its_gradients_alone():
    rng = np.random.default_rng(0)
    x, y, g = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((5, 4, 8), (8, 6), (5, 4, 6)))
    plain = lambda x, y: jnp.einsum("...d,dv->...v", x, y, preferred_element_type=jnp.float32)  # noqa: E731
    mine = partial(ops.product, "...d,dv->...v")
    for dtype, tolerance in (("float32", 0.0), ("bfloat16", 0.02)):
        args = x.astype(dtype), y.astype(dtype)
        (a, pull_a), (b, pull_b) = jax.vjp(plain, *args), jax.vjp(mine, *args)
        assert b.dtype == jnp.float32
        np.testing.assert_array_equal(a, b)
        for want, have in zip(pull_a(g), pull_b(g), strict=True):
            assert have.dtype == jnp.dtype(dtype)
            np.testing.assert_allclose(*(np.asarray(v, np.float32) for v in (have, want)), atol=tolerance * 8, rtol=tolerance)
