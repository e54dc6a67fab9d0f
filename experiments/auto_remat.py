"""config.model.remat=auto: the least recomputation whose next-token step fits, found by compiling it at the start.

Wired into `common.model_config`, so into the stages that build a decoder or an encoder from their config (pretrain, moe, mlm).
Their step is compiled with the next-token loss, the config's optimizer, mesh, batch and accumulation. A stage that starts from
a checkpoint keeps the policy of its model's config.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from experiments import common
from jaxllm.core import sharding, spec
from jaxllm.core.types import TrainState, UserError
from jaxllm.losses import lm
from jaxllm.models import families
from jaxllm.models.layers import padded
from jaxllm.models.stack import POLICIES
from jaxllm.train import fit_memory, moments

SETTINGS = ("batch_size", "accumulate", "mesh", "rules", "optim")  # what a step's memory depends on beside the model
chosen: dict[str, tuple[str, str]] = {}  # (policy, the reason) of what was compiled in this process


def resolve(config: Any, c: Any) -> Any:
    """The model's config with a policy in place of `auto`; UserError when none fits."""
    if families.to_dict(c)["family"] not in ("decoder", "encoder"):
        raise UserError(f"model.remat='auto' is for decoders and encoders; here choose one of {', '.join(POLICIES)}")
    like = dataclasses.replace(c, vocab_size=padded(c.vocab_size), remat="none")
    settings = config.to_dict()
    key = json.dumps([dataclasses.asdict(like), length_of(config, c), [settings[n] for n in SETTINGS]])
    if key not in chosen:
        chosen[key] = _choose(config, like)
    return dataclasses.replace(c, remat=chosen[key][0])


def note(config: Any, run: Any) -> None:
    """Says in the run what was chosen, and why."""
    if "model" in config and config.model.to_dict().get("remat") == "auto":
        for _, reason in chosen.values():
            run.note(reason)


def _choose(config: Any, c: Any) -> tuple[str, str]:
    limit = fit_memory.limit_of(jax.devices()[0])
    if limit is None:
        return "none", f"remat: none, for the memory of a {jax.default_backend()} device is not known"
    policies = [name for name in POLICIES if name != "offload" or moments.has_host_memory()]
    name, tried = fit_memory.least(policies, lambda n: step_bytes(config, dataclasses.replace(c, remat=n)), limit)
    sizes = ", ".join(f"{n} {size / fit_memory.GIB:.2f}" for n, size in tried.items())
    return name, f"remat: {name}, the first that fits into {limit / fit_memory.GIB:.2f} GiB (GiB a device: {sizes})"


def length_of(config: Any, c: Any) -> int:
    return config.data.length if "length" in config.data else c.max_length


def step_bytes(config: Any, c: Any) -> float:
    """Bytes a device of the compiled next-token step of a model's config."""
    model, (tx, _) = families.make(c), common.optimizer(config)
    with common.open_mesh(config) as mesh:
        everywhere = NamedSharding(mesh, PartitionSpec())
        params = {"policy": spec.abstract(model.specs, spec.shardings(model.specs, mesh, sharding.current_rules()))}
        step = jax.ShapeDtypeStruct((), "int32", sharding=everywhere)
        state = TrainState(step, params, moments.abstract(tx, params, everywhere))
        shape = (config.batch_size, length_of(config, c))
        here = jax.sharding.get_abstract_mesh()
        rows = NamedSharding(mesh, PartitionSpec(*sharding.activation_axes(("batch", "length"), shape, here)))
        batch = {n: jax.ShapeDtypeStruct(shape, "int32", sharding=rows) for n in ("tokens", "targets", "segments")}
        batch["mask"] = jax.ShapeDtypeStruct(shape, bool, sharding=rows)
        jitted = common.jit_step(lm.loss(model), tx, state, config.accumulate)
        return fit_memory.peak_of(jitted.lower(state, {}, batch, jax.eval_shape(lambda: jax.random.key(0))).compile())
