"""What a step must send, and how long it takes at best."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import jax

from experiments.plan import hlo, wire
from experiments.plan.machine import Machine
from experiments.plan.stage import Stage
from experiments.plan.work import flops_of, tokens_of
from jaxllm.core import sharding, spec, tree
from jaxllm.train import moments

WAITED = ("tensor", "context", "expert")  # axes whose exchanges are of activations: the next product needs them
MODEL = (
    "the longest of: products at the chip's peak, memory traffic (every array that is not fused away is written and read once), "
    "and weights and gradients on the links; then what activations send, which nothing hides"
)


class Prediction(NamedTuple):
    """Seconds: of products, of memory, of weights and gradients on the wire, of activations on it, and of the step; mfu: model
    FLOPs over what the devices could do in the step."""

    compute: float
    memory: float
    hidden: float
    waited: float
    step: float
    mfu: float


def predict(stage: Stage, text: str, executed: float, mesh: Any, machine: Machine) -> Prediction | None:
    """From the compiled step's HLO and the matrix products that it was traced with; None without a chip."""
    if machine.chip is None:
        return None
    devices = mesh.size
    model_flops = sum(map(flops_of, stage.work))
    compute = max(executed, model_flops) / devices / machine.peak
    memory = traffic(text) / machine.bandwidth
    waits = {mesh.shape[a] for a in WAITED} - {1}
    found = wire.collectives(text)
    seconds = lambda some: sum(c.received for c in some) / machine.wire if machine.wire else 0.0  # noqa: E731
    hidden, waited = (seconds(c for c in found if (c.group in waits) == late) for late in (False, True))
    step = max(compute, memory, hidden) + waited
    return Prediction(compute, memory, hidden, waited, step, model_flops / step / devices / machine.peak)


def traffic(text: str) -> float:
    """Bytes that a step writes to the device's memory and reads back, by the arrays outside of fusions."""
    found, entry = hlo.computations(text)
    fused = hlo.fused_computations(found)
    skipped = ("parameter", "tuple", "while", "bitcast", "get-tuple-element", "constant", "conditional", "call", "iota")
    total = 0.0
    for name, times in hlo.runs(found, entry).items():
        for one in found.get(name, []) if name not in fused else []:
            # S(1): fast memory on the chip; what is updated in place is not written whole
            if one.opcode in skipped or one.opcode.endswith(("-done", "-update")) or "S(1)" in one.shape:
                continue
            size = hlo.size_of(one.shape)
            if "dynamic-update-slice" in one.name or one.opcode == "dynamic-update-slice":
                dims = [int(x) for x in hlo.SHAPE.findall(one.shape)[0][1].split(",") if x]
                size /= max(1, dims[0] if dims else 1)
            total += 2 * size * times
    return total


def executed_flops(jaxpr: Any) -> float:
    """2 m n k of every matrix product in a jaxpr, a scan's as often as it runs: with what is recomputed, and no causal half."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            total += 2.0 * inner * math.prod(eqn.outvars[0].aval.shape)
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            for one in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(one, "jaxpr", one)
                total += times * executed_flops(inner) if hasattr(inner, "eqns") else 0.0
    return total


def minimum(stage: Stage, mesh: Any, accumulate: int) -> float | None:
    """The fewest bytes that one device must receive in a step for its parameters, None with axes that split activations.

    Weights that are split over the axes of the batch come together once for every pass over a layer, once in all outside of
    layers, in the dtype of the model; gradients are scattered in it once. Over axes that hold copies of the weights gradients
    are reduced: twice their size. A table that only looks tokens up needs no more than the activations that it gives.
    """
    if any(mesh.shape[axis] > 1 for axis in WAITED):
        return None
    rules, total = sharding.current_rules(), 0.0
    over = set(spec.mesh_axes("batch", rules))
    for root, specs in stage.specs.items():
        mine = [w for w in stage.work if w.model.specs is specs]
        passes = sum(2 if w.backward else 1 for w in mine)
        width = jax.numpy.dtype(mine[0].model.config.dtype).itemsize
        for path, leaf in tree.flatten(specs).items():
            if path == "head/kernel" and not mine[0].head:
                continue
            bytes_ = math.prod(leaf.shape) * width
            if path == "embed/tokens" and ("head" in specs or not mine[0].head):
                looked_up = tokens_of(tuple(mine)) // mesh.size * leaf.shape[1] * width * accumulate
                bytes_ = min(bytes_, looked_up)
            axes = {n for logical in leaf.axes for n in spec.mesh_axes(logical, rules) if mesh.shape[n] > 1} & over
            split = math.prod(mesh.shape[n] for n in axes)
            copies = math.prod(mesh.shape[n] for n in over - axes)
            trained = bool(re.search(stage.trainable, f"{root}/{path}"))
            times = (passes if "layers" in leaf.axes else 1) + trained
            total += accumulate * times * bytes_ * (split - 1) / split
            total += trained * 2 * bytes_ / split * (copies - 1) / copies
    return total


def held_bytes(stage: Stage, mesh: Any) -> float:
    """Bytes of one device of what lies beside the step."""
    rules = sharding.current_rules()
    return sum(local_bytes(spec.abstract(specs, spec.shardings(specs, mesh, rules))) for specs in stage.held.values())


def local_bytes(shapes: Any) -> float:
    """Bytes of one device of a tree of shapes with layouts; what lies in the host's memory is not counted."""
    there = [x for x in jax.tree.leaves(shapes) if x.sharding.memory_kind != moments.HOST]
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in there))
