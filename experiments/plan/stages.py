"""What the experiments compile, as shapes: the models, parameters, losses and batches of their configs."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import common, dpo, kto, mlm, moe
from experiments.plan.stage import Stage, abstract, adapted, base_model, record, shaped
from experiments.plan.work import Work
from jaxllm.data import denoise, masking
from jaxllm.losses import lm, reward
from jaxllm.models import decoder, encdec, encoder, heads


def pretrain(config: Any, name: str) -> Stage:
    model = decoder.make(common.model_config(config, decoder.DecoderConfig, config.vocab_size))
    return language(config, model, lm.loss(model), common.optimizer(config)[0])


def mixture(config: Any, name: str) -> Stage:
    model = decoder.make(moe.config_of(config, config.vocab_size))
    return language(config, model, moe.objective(config, model), moe.optimizer(config, model.config)[0])


def language(config: Any, model: Any, loss: Any, tx: Any, trainable: str = ".*") -> Stage:
    """Next tokens on packed rows."""
    rows, length = config.batch_size, config.data.length
    common.check_length(model, length, "config.data.length")
    work = (Work(model, rows, length, trainable=trainable),)
    return Stage(model, {"policy": model.specs}, trainable, loss, tx, record(rows, length), work)


def sft(config: Any, name: str) -> Stage:
    model, trainable = adapted(config, base_model(config, name), "policy")
    return language(config, model, lm.loss(model), common.optimizer(config)[0], trainable)


def masked(config: Any, name: str) -> Stage:
    mlm.check(config)
    rows, length, vocab = config.batch_size, config.data.length, config.vocab_size + len(masking.FALLBACKS)
    objective = mlm.OBJECTIVES[config.objective]
    trunk = encoder.make(common.model_config(config, encoder.EncoderConfig, vocab))
    model = objective.head(trunk)
    dynamic = masking.dynamic(mask_id=vocab - 1, vocab=np.arange(config.vocab_size), rate=config.mask_rate)
    corrupt = {"dynamic": dynamic, "static": masking.static}[config.masking]
    ids = {n: shaped(jnp.int32, rows, length) for n in ("tokens", "segments", "types", "inputs")}
    batch = ids | {n: shaped(jnp.bool_, rows, length) for n in ("eligible", "chosen")} | {"is_next": shaped(jnp.int32, rows)}
    use = {"tokens", "segments", "eligible"} | ({"inputs", "chosen"} if config.masking == "static" else set())
    use |= {"types", "is_next"} if config.objective == "mlm+nsp" else set()
    batch = {n: x for n, x in batch.items() if n in use}
    work = (Work(trunk, rows, length),)
    return Stage(model, {"policy": model.specs}, ".*", objective.loss(model, corrupt), common.optimizer(config)[0], batch, work)


def text_to_text(config: Any, name: str) -> Stage:
    c, rows = config.data, config.batch_size
    model = encdec.make(common.model_config(config, encdec.EncDecConfig, config.vocab_size + denoise.SENTINELS))
    if config.objective == "spans":
        source, length = denoise.lengths(denoise.raw_length(c.length, c.density, c.mean_span), c.density, c.mean_span)
    else:
        source, length = c.length, c.target_length if config.objective == "text2text" else c.length + 1
    inputs = {n: shaped(jnp.int32, rows, source) for n in ("tokens", "segments")}
    batch = {"inputs": inputs, **record(rows, length)}
    work = (Work(model, rows, length, source),)
    return Stage(model, {"policy": model.specs}, ".*", lm.loss(model), common.optimizer(config)[0], batch, work)


def pairs(config: Any, name: str) -> Stage:
    base = base_model(config, name)
    model, trainable = adapted(config, base, "policy")
    rows, length = config.batch_size, config.data.length
    common.check_length(model, length, "config.data.length")
    build, score = dpo.objective(config)
    sides = {side: record(rows, length) for side in ("chosen", "rejected")}
    known = jax.eval_shape(lambda p, r: score(base, p, r), abstract(base.specs), sides["chosen"])
    batch = sides | {f"ref_{side}_logps": known for side in sides}
    work = (Work(model, 2 * rows, length, trainable=trainable),)
    return Stage(model, {"policy": model.specs}, trainable, build(model), common.optimizer(config)[0], batch, work)


def rewards(config: Any, name: str) -> Stage:
    model, trainable = adapted(config, heads.with_scalar_head(base_model(config, name)), "reward")
    rows, length = config.batch_size, config.data.length
    loss = reward.loss(partial(heads.scalars, model), center=config.center)
    batch = {side: record(rows, length) for side in ("chosen", "rejected")}
    work = (Work(model, 2 * rows, length, trainable=trainable, head=False),)
    return Stage(model, {"reward": model.specs}, trainable, loss, common.optimizer(config)[0], batch, work)


def labelled(config: Any, name: str) -> Stage:
    model, trainable = adapted(config, base_model(config, name), "policy")
    rows, length = config.batch_size, config.data.length
    sides = {side: record(rows, length) for side in ("completion", "mismatched")}
    columns = {n: shaped(jnp.float32, rows) for n in ("ref_logps", "ref_mismatched_logps")}
    batch = sides | columns | {"label": shaped(jnp.bool_, rows)}
    work = (Work(model, rows, length, trainable=trainable), Work(model, rows, length, backward=False))
    loss = kto.objective(config)(model)
    return Stage(model, {"policy": model.specs}, trainable, loss, common.optimizer(config)[0], batch, work)
