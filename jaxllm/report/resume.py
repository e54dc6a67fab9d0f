"""Whether a run directory may be gone on with under the settings that are given now, and what was changed on purpose."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxllm.report.files import flatten, plain, read_json
from jaxllm.report.secrets import redact, remember

# settings that change no bit of the weights
RESUMABLE = ("log_every", "save_every", "save_seconds", "eval_every", "keep", "watchdog", "gates", "profile", "show_sharding")
_ELSEWHERE = "To start a new run, give another --workdir"


def check_resume(
    workdir: Path | str, experiment: str, config: Mapping[str, Any], allow: Sequence[str] | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """(the settings that the run in `workdir` chose itself, {name: "was 1, now 2"} of those in `allow` that differ).

    allow: settings, or groups of them, that may differ; None where the caller has no such flag to name. UserError when the run
    is another experiment's, or any other setting differs.
    """
    workdir = Path(workdir)
    remember(config, sys.argv)
    begun = ("metrics.jsonl", "chosen.json", "result.json")
    if not (workdir / "config.json").exists() or not any((workdir / name).exists() for name in begun):
        return {}, {}  # nothing was trained yet: a run that was refused may be given other settings
    stored, env, chosen = (read_json(workdir / name) for name in ("config.json", "env.json", "chosen.json"))
    if (before := env.get("experiment", experiment)) != experiment:
        raise _user_error(f"Cannot resume {workdir}: it is a run of {before}, not {experiment}. {_ELSEWHERE}")
    old, new = dict(flatten(stored)), dict(flatten(plain(redact(dict(config)))))
    for name, value in chosen.items():
        new[name] = new.get(name) or value  # not given again: what was chosen stays
    changed = {
        name: f"was {_shown(old, name)}, now {_shown(new, name)}"
        for name in sorted(old.keys() | new.keys())
        if name not in RESUMABLE and not name.startswith("mesh.") and _shown(old, name) != _shown(new, name)
    }
    refused = [name for name in changed if not named_by(allow or (), name)]
    if refused:
        raise _user_error(
            f"Cannot resume {workdir}: {'; '.join(f'{name} {changed[name]}' for name in refused)}. "
            f"Only {', '.join(RESUMABLE)} and the mesh may change on resume. {_ELSEWHERE}{_all_the_same(allow, refused)}"
        )
    return chosen, changed


def named_by(allow: Sequence[str], name: str) -> bool:
    """Whether a setting, or a group that it stands in, is among `allow`."""
    return any(name == given or name.startswith(f"{given}.") for given in allow)


def _all_the_same(allow: Sequence[str] | None, refused: Sequence[str]) -> str:
    if allow is None:
        return ""
    names = ",".join(dict.fromkeys([*allow, *refused]))
    return f"; to go on with this one all the same, add --allow={names} (its bits are then those of no one config)"


def _shown(flat: Mapping[str, Any], name: str) -> str:
    return json.dumps(flat[name]) if name in flat else "not there"


def _user_error(message: str) -> Exception:
    from jaxllm.core.types import UserError

    return UserError(message)
