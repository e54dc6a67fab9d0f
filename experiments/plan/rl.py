"""The updates and rollouts of PPO and GRPO, as shapes."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

from experiments import common, completions, grpo, ppo
from experiments.plan.stage import Stage, abstract, adapted, base_model, shaped
from experiments.plan.work import Work
from jaxllm.models import heads
from jaxllm.train.online import remembering

ASSUMED = 512  # tokens of a prompt or a completion where the config leaves them to the data
TOKENIZER = SimpleNamespace(specials={"eos": 0})  # all that sampling asks of one


def prompts_of(rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {"tokens": shaped(jnp.int32, rows, length), "lengths": shaped(jnp.int32, rows)}


def optimizer(config: Any) -> Any:
    return common.optimizer(config, config.steps * config.epochs * config.minibatches)[0]


def cut(batch: Any, parts: int) -> Any:
    """The shapes of one of `parts` minibatches."""
    return jax.tree.map(lambda x: shaped(x.dtype, x.shape[0] // parts, *x.shape[1:]), batch)


def lengths_of(config: Any, model: Any) -> tuple[int, int, tuple[str, ...]]:
    """(prompt, completion) tokens, and what is said where they are assumed."""
    assumed = min(ASSUMED, model.config.max_length // 2)
    found = {name: config[name] or assumed for name in ("max_prompt", "max_new_tokens")}
    common.check_length(model, sum(found.values()), "config.max_prompt + config.max_new_tokens")
    notes = tuple(f"config.{name}=0 leaves it to the data: planned with {assumed}" for name in found if not config[name])
    return *found.values(), notes


def group(config: Any, name: str) -> Stage:
    grpo.check(config)
    base = base_model(config, name)
    model, trainable = adapted(config, base, "policy")
    prompt, new, notes = lengths_of(config, model)
    rows = (config.groups or config.batch_size) * config.group
    sample = completions.sampler(
        base, TOKENIZER, max_new_tokens=new, temperature=config.temperature, top_p=config.top_p, group=config.group,
        slots=config.slots,
    )  # fmt: skip
    samples, seen = jax.eval_shape(sample, abstract(base.specs), prompts_of(rows // config.group, prompt), key(), 0)
    one = shaped(jnp.float32, rows)
    given = {"values": one, "valid": shaped(jnp.bool_, rows), "greedy": one}
    prepare = grpo.make_prepare(config, model, new, grpo.nucleus(config.top_p), lambda p: p, dict)
    roots, frozen = {"policy": abstract(model.specs)}, {"reference": abstract(base.specs)}
    batch, _ = jax.eval_shape(prepare, roots, frozen, {"samples": samples, "record": seen}, given)
    batch = cut(batch, config.minibatches)
    work = (Work(model, rows // config.minibatches, prompt + new, trainable=trainable),)
    loss = grpo.objective(config, model)
    held = {} if config.lora.rank else {"reference": base.specs}
    rollout = (sample, prompts_of(config.batch_size, prompt))
    return Stage(model, {"policy": model.specs}, trainable, loss, optimizer(config), batch, work, held, rollout, notes)


def proximal(config: Any, name: str) -> Stage:
    ppo.check(config)
    base = base_model(config, name)
    model, trainable = adapted(config, base, "policy")
    prompt, new, notes = lengths_of(config, model)
    rows = config.batch_size
    valued = heads.with_scalar_head(base)
    scalars = partial(heads.scalars, valued)
    sample = completions.sampler(base, TOKENIZER, max_new_tokens=new, temperature=config.temperature)
    samples, seen = jax.eval_shape(sample, abstract(base.specs), prompts_of(rows, prompt), key(), 0)
    memory = ppo.policy.AdaptiveKL(jnp.float32(config.kl_coef))
    prepare = ppo.make_prepare(config, model, scalars, lambda p: p)
    roots = {"policy": abstract(model.specs), "value": abstract(valued.specs)}
    frozen = {"reference": abstract(base.specs), "memory": memory}
    packed = {n: seen[n] for n in ("tokens", "targets", "segments", "mask")} if config.ptx_coef else {}
    batch, _ = jax.eval_shape(prepare, roots, frozen, (samples, seen, packed), shaped(jnp.float32, rows))
    batch = cut(batch, config.minibatches)
    part = rows // config.minibatches
    work = (Work(model, part, prompt + new, trainable=trainable), Work(valued, part, prompt + new, head=False))
    work += (Work(model, part, prompt + new, trainable=trainable),) if config.ptx_coef else ()
    held = {"reward": valued.specs} | ({} if config.lora.rank else {"reference": base.specs})
    specs = {"policy": model.specs, "value": valued.specs}
    loss, tx = ppo.objective(config, model, scalars), remembering(optimizer(config), memory)
    rollout = (sample, prompts_of(rows, prompt))
    return Stage(model, specs, f"{trainable}|^value/", loss, tx, batch, work, held, rollout, notes)


def key() -> jax.Array:
    return jax.random.key(0)
