"""What a run knows of itself and of the runs that it started from, for the model card of an export."""

from __future__ import annotations

import json
import math
from pathlib import Path

from experiments.common import NEEDS
from jaxllm import launch
from jaxllm.convert import hub
from jaxllm.convert.card import Adapter, Facts, Stage
from jaxllm.core import spec
from jaxllm.core.types import UserError
from jaxllm.models import decoder
from jaxllm.report.secrets import redact
from jaxllm.train import checkpoint

LONGEST = 20  # runs of a chain


def stage_of(meta, workdir):
    config = redact(meta["config"])
    data = config.get("data", {})
    path = str(data.get("path") or "") if isinstance(data, dict) else ""
    return Stage(meta["experiment"], int(meta["step"]), config, path, redact(environment(workdir).get("command", "")))


def environment(workdir):
    """env.json of a run; {} where there is none."""
    path = workdir / "env.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def start_of(meta, workdir):
    """(directory, step or None) of the run that a run began from: its `init`, or what it trained first in its own directory.

    None where it began from nothing; UserError where that run is not there.
    """
    default = {**NEEDS, "pretrain": "", "flamingo": "pretrain", "classify": "mlm"}.get(meta["experiment"], "sft")
    if start := meta["config"].get("init"):
        return launch.find_stage(start, default=default)
    own = workdir / default
    return (own, None) if default and (own / "checkpoints").is_dir() else None


def lineage(meta, workdir):
    """(stages from the first run to this one, what the first was taken in from), as far as the runs are there."""
    found = [stage_of(meta, workdir)]
    while len(found) < LONGEST:
        try:
            if (start := start_of(meta, workdir)) is None:
                break
            workdir, step = start
            meta = checkpoint.newest_meta(workdir, step)
        except (UserError, OSError):
            break
        found.append(stage_of(meta, workdir))
    return tuple(reversed(found)), str(meta["config"].get("source") or "")


def result_of(loaded):
    """(metrics, claims) of result.json; (None, ()) without one, or when a later checkpoint than this one is there."""
    path = loaded.workdir / "result.json"
    steps = [int(p.name) for p in (loaded.workdir / "checkpoints").iterdir() if p.name.isdigit()]
    if not path.is_file() or loaded.step < max(steps, default=0):
        return None, ()
    result = json.loads(path.read_text(encoding="utf-8"))
    numbers = {k: v for k, v in result["metrics"].items() if isinstance(v, int | float) and math.isfinite(v)}
    return numbers, tuple(result.get("claims", ()))


def adapter_of(loaded, stages, source):
    """The Adapter of a run that was loaded with its adapters apart. The weights below it are the published ones it came from
    only where no stage before has trained."""
    given = loaded.meta["lora"]["policy"]
    base = source if hub.NAME.fullmatch(source) and not any(stage.step for stage in stages[:-1]) else ""
    try:
        where, step = start_of(loaded.meta, loaded.workdir) or ("", None)
        run = str(where) + f"@{step}" * (step is not None)
    except UserError:  # the run is gone: its name is what is left
        run = str(loaded.meta["config"].get("init", ""))
    return Adapter(given["rank"], given["alpha"], given["scaling"], given["match"], base, run)


def facts_of(loaded, target, *, license="", adapter=False):
    """Facts for `convert.card.card` of a loaded run that is exported to `target`, or of its adapters alone."""
    stages, source = lineage(loaded.meta, loaded.workdir)
    metrics, claims = result_of(loaded)
    env, config = environment(loaded.workdir), loaded.model.config
    whole = {name: tree for name, tree in loaded.model.specs.items() if name != "lora"}
    parameters = decoder.published_count(config) if isinstance(config, decoder.DecoderConfig) else spec.count(whole)
    return Facts(
        Path(target).name, parameters, config, stages, source, metrics, claims,
        {n: v for n, v in env.get("versions", {}).items() if n in ("jaxllm", "jax")}, str(env.get("git") or ""), license,
        adapter_of(loaded, stages, source) if adapter else None,
    )  # fmt: skip
