"""All checks in their order, and the rehearsal of a run from its first step to its export."""

from __future__ import annotations

import importlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments import convert, teach
from experiments.doctor import data, inner, models, steps, subject, words
from experiments.doctor.capture import Seen, copied, watched
from experiments.doctor.small import changes
from experiments.doctor.verdict import Verdict, absent, attempted
from experiments.plan.plan import changed
from jaxllm import launch
from jaxllm.core.types import UserError

BROKEN = "this check could not be made: the message says where it stopped"
Tell = Callable[[Verdict], None]


def examine(seen: Seen, tell: Tell) -> None:
    """The checks of columns, tokenizer, model, loss and first steps; each verdict is told when it is there."""
    fit = seen.fit
    taught = seen._replace(fit={**fit, "columns": teach.at("data", fit["columns"], fit["tokenizer"])})
    teach.announce(seen.config, fit["run"], fit["columns"], taught.fit["columns"])
    for group in (data, words, models):
        for name, check in group.CHECKS.items():
            tell(attempted(name, lambda check=check: check(taught), BROKEN))
    try:
        begun = subject.begun(taught._replace(fit={**taught.fit, "columns": fit["columns"]}))
    except Exception as error:
        return tell(Verdict("first step", None, None, False, f"{type(error).__name__}: {error}"[:300], BROKEN))
    for name, check in steps.CHECKS.items():
        tell(attempted(name, lambda check=check: check(begun), BROKEN))


def rehearse(seen: Seen, fit: Callable) -> Any:
    """The run in two steps: one, saved; restored, and another one with evaluation. What `main` then makes of it is rehearsed too."""
    given = {name: x for name, x in seen.fit.items() if name != "run"}
    short = lambda steps: changed(seen.config, {"steps": steps, "eval_every": 0, "gates": False})  # noqa: E731
    fit(short(1), seen.fit["run"], **{**given, "state": copied(given["state"]), "evaluate": None})
    return fit(short(2), seen.fit["run"], **given)


def exported(workdir: Path, experiment: str) -> str:
    """What became of the rehearsal's last checkpoint: loaded, and exported where its family has a published form."""
    loaded = launch.load(workdir)
    target = workdir / "export"
    try:
        architecture = convert.export(workdir, target)
    except UserError as error:
        return f"saved, restored at step {loaded.step}; not exported: {error}"[:110]
    finally:
        shutil.rmtree(target, ignore_errors=True)
    return f"saved, restored at step {loaded.step}, exported as {architecture}"


def run(config: Any, experiment: str, workdir: Path, tell: Tell, say: Callable[[str], None] = print) -> None:
    """The battery on an experiment's config in a working directory that may be thrown away."""
    teach.of(config)
    experiment, config, why = inner.of(experiment, config)
    for line in filter(None, [why]):
        say(line)
    if small := changes(config):
        say("made small for the check: " + ", ".join(f"{n}={x}" for n, x in small.items()))
    config, main = changed(config, small), importlib.import_module(f"experiments.{experiment}").main
    began, reached = time.monotonic(), []

    def here(seen: Seen, fit: Callable) -> Any:
        reached.append(seen)
        examine(seen, tell)
        return rehearse(seen, fit)

    def whole() -> Verdict:
        launch.execute(main, experiment, config, workdir, f"python -m experiments.{experiment}", {})
        said = exported(workdir, experiment) if reached else "it ran to its end"
        return Verdict("rehearsal", time.monotonic() - began, None, True, f"seconds; {said}")

    with watched(experiment, here) as seen:
        verdict = attempted("rehearsal", whole, "the run would stop here: the message says why")
        if not reached and verdict.ok:
            for name, reason in (("data", "no training: its samples are looked at"),):
                tell(absent(name, reason))
            tell(attempted("sampler = trainer", lambda: models.sampler(seen), BROKEN))
    tell(verdict)
