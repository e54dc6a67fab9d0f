"""The compiled train step holds no buffer of tokens x vocabulary."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxllm.core import ops, spec
from jaxllm.core.types import Mean, mean_of
from jaxllm.data import masking
from jaxllm.losses import bilm, lm, mlm, policy, preference
from jaxllm.models import decoder, encdec, encoder, recurrent
from jaxllm.train.step import init_state, make_train_step
from tests.models.tiny import fast_jit

VOCAB, ROWS, LENGTH = 32_768, 4, 256
SIZES = dict(vocab_size=VOCAB, max_length=LENGTH, d_model=8, n_layers=1, n_heads=2, d_ff=16)
MODEL = decoder.make(decoder.DecoderConfig(**SIZES, mtp_layers=1))
ENCODER = encoder.make(encoder.EncoderConfig(**SIZES))
T5 = encdec.make(encdec.EncDecConfig(**SIZES))
ELMO = recurrent.make_elmo(recurrent.BiLSTMConfig(VOCAB, LENGTH, width=8, d_hidden=8, n_layers=1))


def arrays(shape, **dtypes):
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in dtypes.items()}


RECORD = arrays((ROWS, LENGTH), tokens=jnp.int32, targets=jnp.int32, segments=jnp.int32, mask=bool)
FLOATS = dict.fromkeys(("logps_old", "values_old", "advantages", "returns"), jnp.float32)


def naive_loss(params, batch, rng):
    hidden = MODEL.apply(params["policy"], batch["tokens"], segments=batch["segments"]).hidden
    logps = jax.nn.log_softmax(ops.logits(MODEL.head(params["policy"]), hidden))
    mean = mean_of(-jnp.take_along_axis(logps, batch["targets"][..., None], axis=-1)[..., 0], batch["mask"])
    return mean, {"loss": mean}


def scalars(params, record):
    return jnp.zeros(record["tokens"].shape) + params["bias"].reshape(1, 1)


PAIR = {"chosen": RECORD, "rejected": RECORD} | arrays((ROWS,), ref_chosen_logps=jnp.float32, ref_rejected_logps=jnp.float32)
TOKENS = PAIR | arrays((ROWS, LENGTH), ref_chosen_logps=jnp.float32, ref_rejected_logps=jnp.float32)
LABELLED = {"completion": RECORD, "mismatched": RECORD} | arrays(
    (ROWS,), ref_logps=jnp.float32, ref_mismatched_logps=jnp.float32, label=bool
)
ROLLOUT = RECORD | arrays((ROWS, LENGTH), **FLOATS)
GROUPS = ROLLOUT | arrays((ROWS, LENGTH), ref_logps=jnp.float32, weights=jnp.float32, importance=jnp.float32)
PTX = ROLLOUT | {"ptx": RECORD | arrays((ROWS, LENGTH), weights=jnp.float32)}
MASKED = RECORD | arrays((ROWS, LENGTH), eligible=bool)

clipped = partial(policy.clipped, low=0.2, high=0.2)
ppo = policy.loss(MODEL, scalars, clip=0.2, value_clip=0.2, value_coef=0.1)
corrupt = masking.dynamic(mask_id=4, vocab=range(5, VOCAB))
# every builder that reads the vocabulary: (the roots' specs, losses with their batches); a group is one compilation
LOSSES = {
    "lm": (MODEL.specs, [(lm.loss(MODEL, mtp=0.1), RECORD)]),
    "mlm": (ENCODER.specs, [(mlm.loss(ENCODER, corrupt), MASKED)]),
    "bilm": (ELMO.specs, [(bilm.loss(ELMO), RECORD)]),
    "t5": (T5.specs, [(lm.loss(T5), RECORD | {"inputs": arrays((ROWS, LENGTH), tokens=jnp.int32, segments=jnp.int32)})]),
    "ppo": (MODEL.specs, [(ppo, ROLLOUT), (policy.with_ptx(ppo, MODEL, ptx_coef=0.5), PTX)]),
    "group": (MODEL.specs, [
        (policy.group_loss(MODEL, clipped, kl=policy.k3, kl_coef=0.1, temperature=0.7, transform=lambda x: 2 * x), GROUPS),
    ]),
    "pairs": (MODEL.specs, [
        (preference.loss(MODEL, preference.dpo, beta=0.1, nll_weight=0.2), PAIR),
        (preference.ld_dpo(MODEL, beta=0.1, alpha=0.5), TOKENS),
    ]),
    "tokens": (MODEL.specs, [
        (preference.wpo(MODEL, preference.dpo, beta=0.1), PAIR), (preference.token_unlikelihood(MODEL, alpha=0.1), PAIR),
    ]),
    "rows": (MODEL.specs, [(preference.row_loss(MODEL, preference.kto, beta=0.1), LABELLED)]),
}  # fmt: skip


def sizes_in(compiled):
    """Elements of every array in a compiled program's HLO."""
    text = compiled.as_text()
    sizes = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", text)]
    assert sizes, "no shapes found: has the HLO's text changed?"
    return sizes


def largest_array(losses, specs=MODEL.specs):
    """Elements of the largest array in the compiled step of the sum of some losses, each on its own batch."""

    def total(params, batch, rng):
        found = [loss(params, part, rng)[0] for (loss, _), part in zip(losses, batch, strict=True)]
        mean = Mean(sum(m.value() for m in found), jnp.float32(1))
        return mean, {"loss": mean}

    tx = optax.sgd(1e-2)
    value = {"bias": spec.Spec((1,), (None,), jax.nn.initializers.zeros)}
    state, frozen = jax.eval_shape(lambda: init_state(
        spec.init({"policy": specs, "value": value}, jax.random.key(0)), tx
    ))  # fmt: skip
    step = fast_jit(make_train_step(total, tx), donate_argnums=0)
    batch = [part for _, part in losses]
    return max(sizes_in(step.lower(state, frozen, batch, jax.eval_shape(lambda: jax.random.key(0))).compile()))


@pytest.mark.parametrize("name", LOSSES)
def test_no_buffer_of_tokens_times_vocabulary(name):
    specs, losses = LOSSES[name]
    largest = largest_array(losses, specs)
    assert largest < ROWS * LENGTH * VOCAB, f"an array of {largest} elements"
    assert largest >= VOCAB * MODEL.config.d_model  # the parse sees at least the embedding


def test_scoring_with_a_reference_holds_none():
    """The columns of DPO, KTO and RL: log-probabilities of frozen weights."""
    params = spec.abstract(MODEL.specs)

    def scores(params, record):
        return preference.sequence_logps(MODEL, params, record), ops.model_logps(MODEL, params, record, None, 0.7).entropy

    assert max(sizes_in(fast_jit(scores).lower(params, RECORD).compile())) < ROWS * LENGTH * VOCAB


def test_a_naive_loss_has_such_a_buffer():
    """The test above can fail."""
    assert largest_array([(naive_loss, RECORD)]) >= ROWS * LENGTH * VOCAB
