"""What one experiment compiles, as shapes."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.plan.work import Work
from jaxllm import launch
from jaxllm.adapt import lora
from jaxllm.core.types import UserError
from jaxllm.models import decoder, families
from jaxllm.models.presets import preset

RowShapes = Any  # a tree of jax.ShapeDtypeStructs whose first axis is the example


class Stage(NamedTuple):
    """One experiment's train step. specs: {root: specs} that it reads; trainable: which of them move; held: {root: specs} that
    lie in memory beside it; work: what its FLOPs are counted from; rollout: of RL, a jitted function and its prompts' shapes;
    notes: what the config leaves open and the plan assumes."""

    model: Any
    specs: dict[str, Any]
    trainable: str
    loss: Any
    tx: Any
    batch: RowShapes
    work: tuple[Work, ...]
    held: dict[str, Any] = {}
    rollout: tuple[Any, Any] | None = None
    notes: tuple[str, ...] = ()


def shaped(dtype: Any, *dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def record(rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a sequence record."""
    ids = {name: shaped(jnp.int32, rows, length) for name in ("tokens", "targets", "segments")}
    return ids | {"mask": shaped(jnp.bool_, rows, length)}


def base_model(config: Any, name: str) -> Any:
    """The model that a stage starts from: that of a preset, or of the run of config.init."""
    if name:
        return decoder.make(preset(name))
    if getattr(config, "init", ""):
        from jaxllm.train.checkpoint import newest_meta

        return families.make(families.from_dict(newest_meta(*launch.find_stage(config.init))["model"]))
    raise UserError("this stage starts from a run: name its architecture, --model=llama3.2-1b, or the run, --config.init=DIR")


def adapted(config: Any, model: Any, root: str) -> tuple[Any, str]:
    """(the model with adapters where config.lora asks for them, what is trained), as `common.adapted` has them."""
    settings = config.lora.to_dict()
    if not settings["rank"]:
        return model, f"^{root}/"
    return lora.with_lora(model, **launch.lora_settings(settings)), f"^{root}/(lora|scalar)/"


def abstract(specs: Any) -> Any:
    return jax.tree.map(lambda s: shaped(s.dtype, *s.shape), specs)
