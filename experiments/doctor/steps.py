"""Checks of the loss, of its gradients and of what a step moves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from experiments.doctor import models, reference
from experiments.doctor.numbers import GRADIENTS, PAD, apart, nudged, padded, several, tolerance, unpacked
from experiments.doctor.subject import STEPS, Subject, gradients
from experiments.doctor.verdict import Verdict, absent, at_most
from jaxllm.core import sharding, tree
from jaxllm.core.types import UserError

WHOLE_BATCH = ("aot", "aot_unpaired", "kto", "bco", "apo_zero_unpaired", "bco_pair")  # losses with a statistic of the batch


def parameters_move(s: Subject) -> Verdict:
    line = s.gates.get("moved")
    if isinstance(line, UserError):
        return Verdict("parameters move", None, None, False, str(line)[:300], "see the gate's line: what is trained must move")
    if line:
        return Verdict("parameters move", None, None, True, line.removeprefix("moved: "))
    grad, rates = s.metrics.get("grad_norm", float("nan")), [float(s.seen.fit["schedule"](i)) for i in range(STEPS)]
    if grad == 0 and any(rates) and s.seen.experiment in ("ppo", "grpo"):
        return absent("parameters move", "the gradient is exactly 0: all rewards were alike (usual before training)")
    said = f"nothing moved in {STEPS} steps: learning rates {', '.join(f'{x:g}' for x in rates)}, grad_norm {grad:g}"
    do = "without a rate: see optim.lr, optim.warmup; without a gradient: nothing is trained in the rows, or pairs are identical"
    return Verdict("parameters move", None, None, False, said, do)


def whole_batch(s: Subject) -> str:
    """Why this loss is not a sum over rows; "" where it is."""
    if "router" in s.seen.config or getattr(s.seen.fit["model"].config, "moe", None):
        return "a router's losses depend on the whole micro-batch"
    if s.seen.config.get("loss", "") in WHOLE_BATCH:
        return f"{s.seen.config.loss} has a statistic of the whole batch"
    if s.seen.config.get("objective", "") == "mlm+nsp":
        return "each term's mean is taken per micro-batch"
    return random(s)


def random(s: Subject) -> str:
    """Why two calls of the loss differ; "" where they do not."""
    first, again = (s.update.loss(s.params, s.batch, jax.random.key(i))[0].total for i in (0, 1))
    return "the loss draws random numbers" if float(first) != float(again) else ""


def accumulation(s: Subject) -> Verdict:
    name, rows = "accumulation", jax.tree.leaves(s.batch)[0].shape[0]
    if why := whole_batch(s):
        return absent(name, f"{why}: accumulation changes it")
    k = next((k for k in (4, 2) if rows % k == 0), 0)
    if not k:
        return absent(name, f"{rows} rows do not divide")
    params = nudged(s.params, 0.05)
    one, many = (gradients(s, params, s.uneven, n) for n in (1, k))
    said = f"gradients of 1 and of {k} micro-batches of unlike sizes"
    do = "carry the sum and the count of a loss through accumulation, and divide once (Mean)"
    return at_most(name, apart(one, many), tolerance(s.seen.fit["model"].config, GRADIENTS), said, do)


def mesh(s: Subject) -> Verdict:
    name, n, rows = "mesh 1 = mesh n", min(2, jax.device_count()), jax.tree.leaves(s.batch)[0].shape[0]
    if n < 2 or s.seen.fit["mesh"].size > 1 or rows % n:
        return absent(name, "one device, or the run is on a mesh already")
    params, other = nudged(s.params, 0.05), sharding.make_mesh({"data": n})
    one = gradients(s, params, s.batch)
    with sharding.use(other, sharding.make_rules(s.seen.config.rules)):
        everywhere = NamedSharding(other, PartitionSpec())
        there = s._replace(first={**s.first, "key": jax.device_put(s.key, everywhere)})
        spread = jax.device_put(jax.device_get(s.batch), NamedSharding(other, PartitionSpec("data")))
        many = jax.device_get(gradients(there, jax.device_put(params, everywhere), spread))
    said, do = f"gradients on 1 device and over {n}", "a mean is taken over a device's rows only"
    return at_most(name, apart(one, many), tolerance(s.seen.fit["model"].config, GRADIENTS), said, do)


def gradient_reach(s: Subject) -> Verdict:
    """Leaves on which the loss depends although their gradient is exactly 0."""
    params, batch = nudged(s.params, 0.05), s.batch
    grads = gradients(s, params, batch)
    still = [p for p, g in grads.items() if not np.asarray(g).any()]
    base = s.value(params, batch)[0].value()
    flat = tree.flatten(params)
    moved = tree.flatten(nudged(tree.unflatten({p: flat[p] for p in still}), 0.5, 1)) if still else {}
    after = s.value(tree.unflatten(flat | moved), batch)[0].value() if still else base
    change = float(abs(after - base)) / max(abs(float(base)), 1e-6)
    shown = ", ".join(still[:3]) + (f" and {len(still) - 3} more" if len(still) > 3 else "")
    said = f"{len(grads) - len(still)} of {len(grads)} trained leaves have a gradient" + (f"; none: {shown}" if still else "")
    do = "the loss depends on leaves that get no gradient: a stop_gradient, a pattern of what is trained, or a detached copy"
    return at_most("gradients", change, 1e-5, said, do)


def padding_loss(s: Subject) -> Verdict:
    if random(s):  # other shapes draw other numbers
        return models.right_padding(s.seen)
    params = nudged(s.params, 0.05)
    one, wide = (gradients(s, params, b) for b in (s.uneven, padded(s.uneven)))
    said = f"gradients of a batch, and with {PAD} empty slots behind each row"
    do = "something reads padding: a mask, a position, or the place at which a score is read"
    return at_most("padding", apart(one, wide), tolerance(s.seen.fit["model"].config, GRADIENTS), said, do)


def packed(s: Subject) -> Verdict:
    """The gradients of packed rows and those of their examples one a row: a loss, one mean of many tokens, hides a leak."""
    name, rows = "packed = separate", several(s.seen.fit["columns"])
    if rows is None:
        return absent(name, "no row holds two examples, or it has inputs of its own beside them")
    if random(s) or "targets" not in rows:
        return models.packed(s.seen, rows)
    alone = unpacked(rows, most=10**6)
    params = nudged(s.params, 0.05)
    one, other = (gradients(s, params, jax.tree.map(jnp.asarray, b)) for b in (rows, alone))
    said = f"gradients of {len(rows['tokens'])} rows, and of their {len(alone['tokens'])} examples one a row"
    do = "examples see each other: pass segments to attention, and let positions restart where they change"
    return at_most(name, apart(one, other), tolerance(s.seen.fit["model"].config, GRADIENTS), said, do)


STEPPING = ("start at the reference", "parameters move", "KL holds")  # what looks at steps that were taken
CHECKS = {
    "start at the reference": reference.at_start, "parameters move": parameters_move, "gradients": gradient_reach,
    "padding": padding_loss, "packed = separate": packed, "accumulation": accumulation, "mesh 1 = mesh n": mesh,
    "KL holds": reference.kl_holds,
}  # fmt: skip
