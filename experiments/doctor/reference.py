"""Checks of the reference: the policy starts at it, and its KL holds the policy back."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from experiments.doctor.capture import copied
from experiments.doctor.numbers import nudged
from experiments.doctor.subject import Subject, first_batch
from experiments.doctor.verdict import Verdict, absent, at_most
from jaxllm.core.types import UserError
from jaxllm.train import gates
from jaxllm.train.loop import fetch

EXPECTED = gates.PAIRS | gates.UNPAIRED | gates.ONLINE
LEAST_KL = 1e-3  # nats a completion, of a policy that was moved by half


def at_start(s: Subject) -> Verdict:
    name = "start at the reference"
    lines = [x for gate, x in s.gates.items() if gate != "moved"]
    if not lines:
        return absent(name, "this stage has no reference")
    # RL's `kl` is over all updates of a step: the first's stands beside it
    there = {n: abs(s.metrics[n] - want) for n, want in EXPECTED.items() if n in s.metrics and f"first/{n}" not in s.metrics}
    refused = next((str(x) for x in lines if isinstance(x, UserError)), "")
    said = refused or ", ".join(f"{n} {s.metrics[n]:.2g}" for n in there) or next(filter(None, lines), "nothing was trained")
    do = "the reference, or a column of its log-probabilities, is of other weights, or the temperature is another one"
    limit = gates.TOLERANCE[getattr(s.seen.fit["model"].config, "dtype", "float32")]
    found = at_most(name, float(np.max([0.0, *there.values()])), limit, said[:200], do)  # numpy's maximum keeps a nan
    return found._replace(ok=found.ok and not refused)  # the gate looks at more metrics than these


def kl_holds(s: Subject) -> Verdict:
    """A policy that has moved has a KL, and pays for it."""
    name, fit = "KL holds", s.seen.fit
    if "objective/kl" not in s.metrics:
        return absent(name, "no KL to a live reference is taken")
    for update in s.seen.updates:
        update.first.clear()
    start = copied(fit["state"])
    moved = start.replace(params={**start.params, "policy": nudged(start.params["policy"], 0.5)})
    _, metrics = fit["step_fn"](moved, fit["frozen"], first_batch(s.seen), s.key)
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
