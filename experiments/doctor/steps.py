"""Checks of the loss, its gradients and the first steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from experiments.doctor.capture import copied
from experiments.doctor.numbers import apart, nudged, padded, tolerance, unpacked
from experiments.doctor.subject import Subject, first_batch, gradients
from experiments.doctor.verdict import Verdict, absent, at_most
from jaxllm.core import sharding, tree
from jaxllm.core.types import UserError
from jaxllm.train import gates
from jaxllm.train.loop import fetch

WHOLE_BATCH = ("aot", "aot_unpaired", "kto", "bco", "apo_zero_unpaired", "bco_pair")  # losses with a statistic of the batch
EXPECTED = gates.PAIRS | gates.UNPAIRED | gates.ONLINE
LEAST_KL = 1e-3  # nats a completion of a policy that was moved by half


def at_reference(s: Subject) -> Verdict:
    name = "start at the reference"
    lines = [x for gate, x in s.gates.items() if gate != "moved"]
    if not lines:
        return absent(name, "this stage has no reference")
    there = {n: abs(s.metrics[n] - want) for n, want in EXPECTED.items() if n in s.metrics}
    said = next((str(x) for x in lines if isinstance(x, UserError)), ", ".join(f"{n} {s.metrics[n]:.2g}" for n in there))
    do = "the reference, or a column of its log-probabilities, is of other weights, or the temperature is another one"
    limit = gates.TOLERANCE[getattr(s.seen.fit["model"].config, "dtype", "float32")]
    return at_most(name, max(there.values(), default=0.0), limit, said[:200], do)


def parameters_move(s: Subject) -> Verdict:
    line = s.gates.get("moved")
    if isinstance(line, UserError):
        return Verdict("parameters move", None, None, False, str(line)[:300], "see the gate's line: what is trained must move")
    if not line:
        return absent("parameters move", "the gradient is exactly 0: all rewards were alike (usual before training)")
    return Verdict("parameters move", None, None, True, line.removeprefix("moved: "))


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
    return at_most(name, apart(one, many), 10 * tolerance(s.seen.fit["model"].config), said, do)


def mesh(s: Subject) -> Verdict:
    name, n, rows = "mesh 1 = mesh n", min(2, jax.device_count()), jax.tree.leaves(s.batch)[0].shape[0]
    if n < 2 or s.seen.fit["mesh"].size > 1 or rows % n:
        return absent(name, "one device, or the run is on a mesh already")
    if why := random(s):
        return absent(name, why)
    params, other = nudged(s.params, 0.05), sharding.make_mesh({"data": n})
    one = gradients(s, params, s.batch)
    with sharding.use(other, sharding.make_rules(s.seen.config.rules)):
        everywhere = NamedSharding(other, PartitionSpec())
        there = s._replace(update=s.update._replace(first={**s.update.first, "key": jax.device_put(s.key, everywhere)}))
        spread = jax.device_put(jax.device_get(s.batch), NamedSharding(other, PartitionSpec("data")))
        many = jax.device_get(gradients(there, jax.device_put(params, everywhere), spread))
    said = f"gradients on 1 device and over {n}"
    return at_most(name, apart(one, many), 10 * tolerance(s.seen.fit["model"].config), said, "a mean is taken over a device's rows only")


def gradient_reach(s: Subject) -> Verdict:
    """Leaves on which the loss depends although their gradient is exactly 0."""
    params, batch = nudged(s.params, 0.05), s.batch
    grads = gradients(s, params, batch)
    still = [p for p, g in grads.items() if not np.asarray(g).any()]
    base = s.value(params, batch)[0].value()
    flat = tree.flatten(params)
    moved = tree.flatten(nudged(tree.unflatten({p: flat[p] for p in still}), 0.5, 1)) if still else {}
    change = float(abs(s.value(tree.unflatten(flat | moved), batch)[0].value() - base)) / max(abs(float(base)), 1e-6) if still else 0.0
    shown = ", ".join(still[:3]) + (f" and {len(still) - 3} more" if len(still) > 3 else "")
    said = f"{len(grads) - len(still)} of {len(grads)} trained leaves have a gradient" + (f"; none: {shown}" if still else "")
    do = "the loss depends on leaves that get no gradient: a stop_gradient, a pattern of what is trained, or a detached copy"
    return at_most("gradients", change, 1e-5, said, do)


def padding_loss(s: Subject) -> Verdict:
    if why := random(s):
        return absent("padding", why)
    params = nudged(s.params, 0.05)
    one, wide = (s.value(params, b)[0] for b in (s.uneven, padded(s.uneven)))
    said = f"the loss of a batch, and with 8 empty slots behind each row: {float(one.value()):.5g}, {float(wide.value()):.5g}"
    do = "something reads padding: a mask, a position, or the place at which a score is read"
    return at_most("padding", apart(one, wide), tolerance(s.seen.fit["model"].config), said, do)


def packed(s: Subject) -> Verdict:
    """The loss of packed rows and that of their examples one a row."""
    name, batch = "packed = separate", s.batch
    if "targets" not in batch or not isinstance(batch, dict) or int(jnp.max(batch["segments"])) < 2:
        return absent(name, "no row holds two examples")
    if "inputs" in batch:
        return absent(name, "rows have inputs of their own beside them")
    rows = jax.tree.map(lambda x: np.asarray(x)[:8], batch)
    alone = unpacked(rows, most=10**6)
    params = nudged(s.params, 0.05)
    one, other = (s.update.loss(params, jax.tree.map(jnp.asarray, b), s.key)[1]["loss"] for b in (rows, alone))
    said = f"{len(rows['tokens'])} rows as {len(alone['tokens'])}: {float(one.value()):.5g}, {float(other.value()):.5g}"
    do = "examples see each other: pass segments to attention, and let positions restart where they change"
    return at_most(name, apart(one, other), tolerance(s.seen.fit["model"].config), said, do)


def kl_holds(s: Subject) -> Verdict:
    """A policy that has moved has a KL, and pays for it."""
    name, fit = "KL holds", s.seen.fit
    if "objective/kl" not in s.metrics:
        return absent(name, "no KL to a live reference is taken")
    for update in s.seen.updates:
        update.first.clear()
    start = copied(fit["state"])
    moved = start.replace(params={**start.params, "policy": nudged(start.params["policy"], 0.5)})
    _, metrics = s.step(moved, fit["frozen"], first_batch(s.seen), s.key)
    found = fetch([metrics])
    kl, pays = found["objective/kl"], s.seen.config.get("kl_coef", 1.0) > 0
    if "objective/non_score_reward" in found:
        pays = found["objective/non_score_reward"] < 0
    elif "ref_logps" in (again := next(u for u in s.seen.updates if u.first)).first["batch"]:
        batch = again.first["batch"]
        alone = batch | {"advantages": jnp.zeros_like(batch["advantages"])}
        pays = float(again.loss(again.first["params"], alone, s.key)[0].value()) > 0
    ok = bool(kl > LEAST_KL and pays)
    said = f"a policy moved at random has a KL of {kl:.3g} nats and {'pays' if pays else 'is paid'} for it"
    do = "the reference moves with the policy, or the coefficient of the KL has the wrong sign"
    return Verdict(name, kl, None, ok, said, do)


CHECKS = {
    "start at the reference": at_reference, "parameters move": parameters_move, "gradients": gradient_reach,
    "padding": padding_loss, "packed = separate": packed, "accumulation": accumulation, "mesh 1 = mesh n": mesh, "KL holds": kl_holds,
}  # fmt: skip
