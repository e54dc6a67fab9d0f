"""LoRA: the start is the base, merged equals unmerged, gradients reach the adapters alone; every architecture."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.adapt import lora
from jaxllm.core import ops, spec
from jaxllm.core.tree import flatten
from jaxllm.core.types import TrainState, UserError, mean_of
from jaxllm.generate import decode
from jaxllm.losses import lm
from jaxllm.models import decoder, encdec, encoder, heads, recurrent
from jaxllm.train import gates
from jaxllm.train.online import make_online_step
from jaxllm.train.step import init_state, make_train_step, trained_roots
from tests.models.tiny import DEEPSEEK, GPT2, LLAMA, STYLES, documents, fast_jit, record, weights

ALL = "kernel$"
RECORD = record([documents([9, 6])[:1], documents([9, 6])[1:]], 8)
ENCODER = encoder.EncoderConfig(vocab_size=50, max_length=16, d_model=16, n_layers=2, n_heads=2, d_ff=24)
T5 = encdec.EncDecConfig(vocab_size=50, d_model=16, n_layers=2, n_heads=2, head_dim=6, d_ff=24)
LSTM = recurrent.LSTMConfig(vocab_size=50, max_length=16, d_model=16, n_layers=2, d_hidden=12)


def adapted(model, match=ALL, seed=1):
    """(the model with adapters of rank 3, random parameters: b is not zero)."""
    model = lora.with_lora(model, rank=3, alpha=6.0, match=match)
    return model, weights(model.specs, seed)


def hidden(model, params):
    """[b, l, d] of RECORD and the head's kernel."""
    given = {"inputs": {n: RECORD[n] for n in ("tokens", "segments")}} if model.encode else {}

    def run(params):
        return ops.forward(model, params, {**RECORD, **given}).hidden, model.head(params).kernel

    return fast_jit(run)(params)


def close(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert float(jnp.abs(x - y).max()) <= tolerance * max(1.0, float(jnp.abs(y).max()))


MODELS = {name: lambda c=c: decoder.make(c) for name, c in STYLES.items()} | {
    "encoder": lambda: encoder.make(ENCODER), "t5": lambda: encdec.make(T5), "lstm": lambda: recurrent.make(LSTM),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_merged_equals_unmerged_and_the_start_is_the_base(name):
    base = MODELS[name]()
    model, params = adapted(base)
    close(hidden(model, params), hidden(base, lora.merge(params, alpha=6.0)))
    plain, adapters = lora.split(params)
    start = hidden(base, plain)
    assert float(jnp.abs(hidden(model, params)[0] - start[0]).max()) > 1e-3
    # b = 0, and no adapters at all: the reference
    fresh = spec.init(model.specs["lora"], jax.random.key(0))
    assert all(not x.any() for p, x in flatten(fresh).items() if p.endswith("/b"))
    assert all(x.any() for p, x in flatten(fresh).items() if p.endswith("/a"))
    close(hidden(model, {**plain, "lora": fresh}), start)
    close(hidden(model, plain), start, 0)
    assert flatten(adapters).keys() == {f"{p}/{x}" for p in flatten(base.specs) if p.endswith("/kernel") for x in "ab"}


def test_the_update_is_scale_a_b():
    """Against numpy, on kernels with one axis of inputs (q), two (o), and a stack of experts."""
    model, params = adapted(decoder.make(DEEPSEEK))
    flat, merged = flatten(params), flatten(lora.merge(params, alpha=6.0, scaling=lora.rslora))
    equations = {"layers/attention/q_b": "ndr,nrhk->ndhk", "layers/attention/o": "nhkr,nrd->nhkd",
                 "layers/ffn/experts/up": "nedr,nerf->nedf", "head": "dr,rv->dv"}  # fmt: skip
    for path, equation in equations.items():
        a, b = (np.asarray(flat[f"lora/{path}/kernel/{x}"], np.float64) for x in "ab")
        want = np.asarray(flat[f"{path}/kernel"]) + 6 / np.sqrt(3) * np.einsum(equation, a, b)
        np.testing.assert_allclose(merged[f"{path}/kernel"], want, rtol=1e-5, atol=1e-5)
    assert lora.standard(6.0, 3) == 2 and "lora" not in lora.merge(params, alpha=6.0)


@pytest.mark.parametrize("style", ["llama", "gpt2", "deepseek"])
def test_it_generates(style):
    base = decoder.make(STYLES[style])
    model, params = adapted(base)
    prompts, lengths = jnp.asarray(RECORD["tokens"][:, :4]), jnp.array([4, 3])

    def sample(model):
        run = lambda p: decode.generate(model, p, prompts, lengths, jax.random.key(0), max_new_tokens=4)  # noqa: E731
        return fast_jit(run)

    ours, merged = sample(model)(params), sample(base)(lora.merge(params, alpha=6.0))
    assert jnp.array_equal(ours.tokens, merged.tokens)
    close(ours.logps, merged.logps)
    again = fast_jit(lambda p: ops.model_logps(model, p, decode.to_record(ours)).logp)(params)
    mask = decode.to_record(ours)["mask"]
    close(jnp.where(mask, again, 0), decode.to_record(ours)["logps"])


def test_a_step_moves_the_adapters_only_and_keeps_one_base():
    """The base is in the frozen argument, in the very buffers that the reference reads, and is never donated."""
    model = lora.with_lora(decoder.make(LLAMA), rank=2, alpha=4.0, match="attention/(q|v)/kernel")
    plain = weights(decoder.make(LLAMA).specs)
    adapters = spec.init(model.specs["lora"], jax.random.key(0))
    tx = optax.adam(1e-2)
    state, frozen = init_state({"policy": {**plain, "lora": adapters}}, tx, "^policy/lora/")
    assert {p.split("/")[1] for p in flatten(state.params)} == {"lora"}
    assert all(x is flatten(plain)[p] for p, x in flatten(frozen["policy"]).items())
    frozen = {**frozen, "reference": plain}
    before = {p: np.array(x) for p, x in flatten(frozen).items()}
    step = fast_jit(make_train_step(lm.loss(model), tx), donate_argnums=0)
    held = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(plain)]
    losses = []
    for _ in range(3):
        state, metrics = step(state, frozen, RECORD, jax.random.key(0))
        losses.append(float(metrics["loss"].value()))
    assert losses[2] < losses[0]
    assert isinstance(state, TrainState) and all(x.any() for x in jax.tree.leaves(state.params))
    assert all(np.array_equal(before[p], x) for p, x in flatten(frozen).items())
    for root in ("policy", "reference"):
        assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(frozen[root])] == held


def test_an_online_iteration_shares_one_base():
    """Sampling, a live reference and updates that donate: policy and reference stay one set of buffers, and the gates pass."""
    plain = weights(decoder.make(LLAMA).specs)
    model = lora.with_lora(decoder.make(LLAMA), rank=2, alpha=4.0, match="attention|ffn")
    own = {**plain, "lora": spec.init(model.specs["lora"], jax.random.key(0))}
    tx = optax.adam(1e-2)
    state, frozen = init_state({"policy": own}, tx, "^policy/lora/")
    frozen = {**frozen, "reference": plain}
    held = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(plain)]

    def policy(params):
        return {**frozen["policy"], "lora": params["policy"]["lora"]}

    @fast_jit
    def sample(params, prompts, key):
        s = decode.generate(model, params, prompts["tokens"], prompts["lengths"], key, max_new_tokens=4)
        return decode.to_record(s)

    @fast_jit
    def prepare(reference, samples, scores):
        kl = samples["logps"] - ops.model_logps(model, reference, samples).logp
        return {**samples, "advantages": scores - scores.mean()}, {"objective/kl": mean_of(kl, samples["mask"])}

    def loss_fn(params, batch, rng):
        logp = ops.model_logps(model, params["policy"], batch).logp
        ratio = jnp.exp(jnp.where(batch["mask"], logp - batch["logps"], 0))
        mean = mean_of(-ratio * batch["advantages"][:, None], batch["mask"])
        return mean, {"loss": mean, "val/ratio": mean_of(ratio, batch["mask"])}

    step = make_online_step(
        lambda params, prompts, key: sample(policy(params), prompts, key),
        lambda frozen, samples: samples["targets"].sum(axis=1).astype(jnp.float32),
        lambda params, frozen, samples, scores: prepare(frozen["reference"], samples, scores),
        fast_jit(make_train_step(loss_fn, tx), donate_argnums=0), epochs=2, minibatches=1,
    )  # fmt: skip
    lines = []
    step = gates.guarded(step, [gates.start(), gates.moved()], lr=lambda i: 1e-2, passed=lines.append)
    prompts = {"tokens": jnp.asarray(RECORD["tokens"][:, :4]), "lengths": jnp.array([4, 3])}
    for _ in range(2):
        state, metrics = step(state, frozen, prompts, jax.random.key(0))
    assert lines[0].startswith("start: first/val/ratio = 1, objective/kl = ") and lines[1].startswith("moved")
    assert abs(float(metrics["objective/kl"].value())) > 1e-6  # the policy has left the reference
    for root in ("policy", "reference"):
        assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(frozen[root])] == held
    whole = trained_roots(state.params, frozen)
    assert whole.keys() == {"policy"} and flatten(whole["policy"]).keys() == flatten(own).keys()
    assert all(flatten(whole["policy"])[p] is x for p, x in flatten(plain).items())


def test_gradients_equal_those_of_merged_weights():
    """The chain rule through W + s a b: dA = s dW B^T, dB = s A^T dW."""
    base = decoder.make(GPT2)
    model, params = adapted(base, "attention/(q|o)|ffn/up")

    def value(model, params):
        return lm.loss(model)({"policy": params}, RECORD, None)[0].value()

    ours = fast_jit(jax.grad(lambda p: value(model, p)))(params)["lora"]
    through = fast_jit(jax.grad(lambda p: value(base, lora.merge(p, alpha=6.0))))(params)["lora"]
    close(ours, through)


def test_a_scalar_head_on_an_adapted_model():
    model, params = adapted(heads.with_scalar_head(decoder.make(LLAMA)), "attention/q/kernel")
    assert {"scalar", "lora"} <= params.keys()
    params["scalar"]["kernel"] = jnp.ones((16, 1))
    plain = heads.with_scalar_head(decoder.make(LLAMA))
    ours, merged = (
        fast_jit(lambda p, m=m: heads.scalars(m, p, RECORD))(p)
        for m, p in ((model, params), (plain, lora.merge(params, alpha=6.0)))
    )
    close(ours, merged)


def test_bfloat16_and_unrolled():
    model, params = adapted(decoder.make(replace(LLAMA, dtype="bfloat16")))
    unrolled, _ = adapted(decoder.make(replace(LLAMA, unroll=True, remat="full")))
    plain, _ = adapted(decoder.make(LLAMA))
    assert hidden(model, params)[0].dtype == jnp.bfloat16
    close(hidden(unrolled, params), hidden(plain, params))


def test_mistakes_are_said():
    base = decoder.make(LLAMA)
    with pytest.raises(UserError, match=r"lora.match='q_proj' matches no kernel: there are head/kernel, layers/attention/k/ker"):
        lora.with_lora(base, rank=2, alpha=4.0, match="q_proj")
    with pytest.raises(UserError, match="no regular expression"):
        lora.with_lora(base, rank=2, alpha=4.0, match="(q")
    with pytest.raises(UserError, match="lora.rank=0"):
        lora.with_lora(base, rank=0, alpha=4.0, match=ALL)
    with pytest.raises(UserError, match="has adapters already"):
        lora.with_lora(adapted(base)[0], rank=2, alpha=4.0, match=ALL)
