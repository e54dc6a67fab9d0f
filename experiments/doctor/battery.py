"""All checks in their order, and the rehearsal of a run from its first step to its export."""

from __future__ import annotations

import contextlib
import importlib
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments import convert, teach
from experiments.doctor import answers, data, inner, models, sampling, steps, subject, words
from experiments.doctor.capture import Seen, copied, sampled, watched
from experiments.doctor.numbers import exact
from experiments.doctor.small import changes
from experiments.doctor.verdict import Enough, Verdict, absent, attempted
from experiments.plan.plan import changed
from jaxllm import launch
from jaxllm.convert import hf
from jaxllm.core import tree
from jaxllm.core.types import UserError

BROKEN = "this check could not be made: the message says where it stopped"
EARLY = (data, answers, words, models, sampling)  # what needs no step
Tell = Callable[[Verdict], None]


def examine(seen: Seen, tell: Tell, wanted: Callable[[str], bool]) -> None:
    """The checks of columns, tokenizer, model, loss and first steps; each verdict is told when it is there."""
    fit = seen.fit
    step = teach.at("step", fit["step_fn"], fit["frozen"])
    taught = seen._replace(fit={**fit, "columns": teach.at("data", fit["columns"], fit["tokenizer"]), "step_fn": step})
    teach.announce(seen.config, fit["run"], fit["columns"], taught.fit["columns"])
    before_steps(taught, EARLY, tell, wanted)
    if not any(map(wanted, steps.CHECKS)):
        return
    try:
        begun = subject.begun(taught, any(map(wanted, steps.STEPPING)))
    except Exception as error:
        return tell(Verdict("first step", None, None, False, f"{type(error).__name__}: {error}"[:300], BROKEN))
    for name in filter(wanted, steps.CHECKS):
        tell(attempted(name, partial(steps.CHECKS[name], begun), BROKEN))


def before_steps(seen: Seen, groups: Sequence[Any], tell: Tell, wanted: Callable[[str], bool]) -> None:
    """The checks of some groups that need no step."""
    for group in groups:
        for name in filter(wanted, group.CHECKS):
            tell(attempted(name, partial(group.CHECKS[name], seen), BROKEN))


def rehearse(seen: Seen, fit: Callable) -> Any:
    """The run in two steps: one, saved; restored, and one more with evaluation. What `main` then does is rehearsed too."""
    given = {name: x for name, x in seen.fit.items() if name != "run"}
    short = lambda steps: changed(seen.config, {"steps": steps, "eval_every": 0, "gates": False})  # noqa: E731
    fit(short(1), seen.fit["run"], **{**given, "state": copied(given["state"]), "evaluate": None})
    return fit(short(2), seen.fit["run"], **given)


def unlike(state: Any, found: Any) -> list[str]:
    """Paths of a trained state's parameters that were read back otherwise, or not at all."""
    flat = tree.flatten(found)
    return [p for p, x in tree.flatten(state.params).items() if p not in flat or not np.array_equal(flat[p], x)]


def spelt(model: Any, params: Any) -> dict[str, np.ndarray]:
    """Parameters by their paths, without the rows that pad a vocabulary."""
    flat, specs = tree.flatten(params), tree.flatten(model.specs)
    rows = min(model.config.vocab_size, getattr(model.config, "outputs", model.config.vocab_size))
    cut = lambda p: tuple(slice(rows if axis == "vocab" else None) for axis in specs[p].axes)  # noqa: E731
    return {p: np.asarray(x)[cut(p)] for p, x in flat.items() if p in specs}


def published(loaded: launch.Loaded, target: Path) -> tuple[str, list[str]]:
    """(the architecture it is exported as, or why it has none; paths of parameters that the export gives back otherwise)."""
    try:
        said = f"exported as {convert.export(loaded.workdir, target)}"
    except UserError as error:
        return f"not exported: {error}".replace(str(loaded.workdir), "this run")[:80], []
    there, ours = (spelt(loaded.model, params) for params in (hf.load(target)[1], loaded.params["policy"]))
    same = ours.keys() & there.keys()  # a published form need not have room for all
    return said, [p for p in ours if p in same and not np.allclose(ours[p], there[p])] if same else list(ours)


def exported(workdir: Path, state: Any) -> Verdict:
    """What became of the rehearsal's last checkpoint: loaded, and exported where its family has a published form."""
    loaded, target = launch.load(workdir), workdir / "export"
    wrong = unlike(state, launch.load(workdir, merged=False).params)
    try:
        form, lost = published(loaded, target)
    finally:
        shutil.rmtree(target, ignore_errors=True)
    said, wrong = f"saved, restored at step {loaded.step}, {form}", wrong + lost
    if wrong:
        said += f"; {len(wrong)} leaves came back otherwise: {', '.join(wrong[:3])}"
    do = "what was saved or exported is not what was trained: the line names the leaves"
    return Verdict("rehearsal", None, None, not wrong, said, do)


def check_names() -> list[str]:
    """Every check's name, in the order of the table."""
    return [name for group in (*EARLY, steps) for name in group.CHECKS] + ["rehearsal"]


def run(
    config: Any, experiment: str, workdir: Path, tell: Tell, say: Callable[[str], None] = print, only: Sequence[str] = ()
) -> None:  # fmt: skip
    """The battery (or the checks named by `only`) on an experiment's config in a working directory that may be thrown away."""
    teach.of(config)
    experiment, config, why = inner.of(experiment, config)
    small = changes(config)
    made = "made small for the check: " + ", ".join(f"{n}={x}" for n, x in small.items()) if small else ""
    for line in filter(None, [why, made]):
        say(line)
    main = importlib.import_module(f"experiments.{experiment}").main
    began, reached, states, wanted = time.monotonic(), [], [], lambda name: not only or name in only

    def here(seen: Seen, fit: Callable) -> Any:
        reached.append(seen)
        with exact():
            examine(seen, tell, wanted)
        if not wanted("rehearsal"):
            raise Enough
        states.append(rehearse(seen, fit))
        return states[-1]

    def whole() -> Verdict:
        try:
            launch.execute(main, experiment, changed(config, small), workdir, f"python -m experiments.{experiment}", {})
        except UserError as error:
            if experiment not in inner.SAMPLED or config.init or not any(s.first for s in seen.samplers):
                raise
            return absent("rehearsal", f"of a fresh model: {error}".replace(str(workdir), "this run"))
        untrained = Verdict("rehearsal", None, None, True, "no training; it ran to its end")
        ended = exported(workdir, states[-1]) if states else untrained
        return ended._replace(number=time.monotonic() - began, said=f"seconds; {ended.said}")

    with watched(experiment, here) as seen, contextlib.suppress(Enough):
        verdict = attempted("rehearsal", whole, "the run would stop here: the message says why")
        if not reached and any(s.first for s in seen.samplers):
            before_steps(sampled(seen._replace(config=config)), (words, models, sampling), tell, wanted)
        tell(verdict)
