"""The compiled train step holds no buffer of tokens x vocabulary."""

import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxllm.core import ops, spec
from jaxllm.core.types import mean_of
from jaxllm.losses import lm, policy
from jaxllm.models import decoder
from jaxllm.train.step import init_state, make_train_step

VOCAB, ROWS, LENGTH = 32_768, 4, 256
MODEL = decoder.make(decoder.DecoderConfig(vocab_size=VOCAB, max_length=LENGTH, d_model=8, n_layers=1, n_heads=2, d_ff=16))


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


def largest_array(loss_fn, batch):
    """Elements of the largest array in the compiled step's HLO."""
    tx = optax.sgd(1e-2)
    value = {"bias": spec.Spec((1,), (None,), jax.nn.initializers.zeros)}
    state, frozen = jax.eval_shape(lambda: init_state(
        spec.init({"policy": MODEL.specs, "value": value}, jax.random.key(0)), tx
    ))  # fmt: skip
    step = jax.jit(make_train_step(loss_fn, tx), donate_argnums=0)
    text = step.lower(state, frozen, batch, jax.eval_shape(lambda: jax.random.key(0))).compile().as_text()
    sizes = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", text)]
    assert sizes, "no shapes found: has the HLO's text changed?"
    return max(sizes)


@pytest.mark.parametrize(
    "loss_fn,batch",
    [
        (lm.loss(MODEL), RECORD),
        (
            policy.loss(MODEL, scalars, clip=0.2, value_clip=0.2, value_coef=0.1),
            RECORD | arrays((ROWS, LENGTH), **FLOATS),
        ),
    ],
    ids=["lm", "ppo"],
)
def test_no_buffer_of_tokens_times_vocabulary(loss_fn, batch):
    largest = largest_array(loss_fn, batch)
    assert largest < ROWS * LENGTH * VOCAB, f"an array of {largest} elements"
    assert largest >= VOCAB * MODEL.config.d_model  # the parse sees at least the embedding


def test_a_naive_loss_has_such_a_buffer():
    """The test above can fail."""
    assert largest_array(naive_loss, RECORD) >= ROWS * LENGTH * VOCAB
