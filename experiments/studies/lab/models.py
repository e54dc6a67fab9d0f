"""The models of a study, and trainings on the way to its arms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxllm.core import spec
from jaxllm.core.types import Batch, Key, Model, Params, TrainState
from jaxllm.models import decoder, heads
from jaxllm.train.optim import adamw, warmup_cosine
from jaxllm.train.step import make_train_step

RECORD = ("tokens", "targets", "segments", "mask")


class Lab(NamedTuple):
    """The models: a policy, and a reward model (a scalar head on a decoder of its own width)."""

    model: Model
    judge: Model


def make(world_length: int, *, vocab: int = 24, prompt: int = 0, width: int = 48, layers: int = 2, judge_width: int = 0) -> Lab:
    """Decoders for strings of a world: judge_width 0 is the policy's width, so that a judge can start from its weights."""

    def sized(d: int) -> Model:
        config = decoder.DecoderConfig(
            vocab_size=vocab + 2, max_length=prompt + world_length + 4, d_model=d, n_layers=layers, n_heads=2, d_ff=4 * d,
            activation="relu", tied=False,
        )  # fmt: skip
        return decoder.make(config)

    return Lab(sized(width), heads.with_scalar_head(sized(judge_width or width)))


def optimizer(lr: float, steps: int, clip_norm: float = 1.0) -> optax.GradientTransformation:
    """AdamW without weight decay, a short warm-up, a cosine to a tenth."""
    return adamw(warmup_cosine(lr, steps, warmup=max(1, steps // 20)), b2=0.98, weight_decay=0.0, clip_norm=clip_norm)


def start(tx: Any, params: Params) -> TrainState:
    """The train state of trees with a leading axis of runs or without: optimizer counters follow the parameters' axes."""
    return TrainState(jnp.int32(0), params, tx.init(params))


def train(loss_fn: Any, tx: Any, params: Params, batch_of: Callable[[Key], Batch], key: Key, steps: int) -> Params:
    """`steps` steps in one scan: what is trained on the way to an experiment's arms."""
    step = make_train_step(loss_fn, tx)

    def body(state: TrainState, k: Key) -> tuple[TrainState, None]:
        return step(state, {}, batch_of(k), k)[0], None

    return jax.lax.scan(body, start(tx, params), jax.random.split(key, steps))[0].params


def rows(columns: Batch, key: Key, n: int) -> Batch:
    """n random rows of columns."""
    index = jax.random.randint(key, (n,), 0, jax.tree.leaves(columns)[0].shape[0])
    return jax.tree.map(lambda x: x[index], columns)


def only(record: Batch) -> Batch:
    """A sequence record without what came along with it."""
    return {name: record[name] for name in RECORD}


def fresh(model: Model, key: Key) -> Params:
    """Random parameters."""
    return spec.init(model.specs, key)
