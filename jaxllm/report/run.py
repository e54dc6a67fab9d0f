"""The run directory: what a run was told, what it measured, and what it concluded, as plain files.

Nothing here imports jax before `open_run`, so that a finished or mismatched directory is answered at once.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.report.console import colour, say
from jaxllm.report.files import (
    dump,
    flatten,
    plain,
    read_json,
    read_jsonl,
    unflatten,
    write_atomic,
)
from jaxllm.report.secrets import clean, clean_message, redact, remember

# settings that change no bit of the weights
RESUMABLE = ("log_every", "save_every", "save_seconds", "keep", "watchdog", "gates", "profile", "show_sharding")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "jaxllm")
ENVIRONMENT = ("XLA_FLAGS", "JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "JAX_ENABLE_X64", "SLURM_JOB_ID")
README = """A run of jaxllm: {experiment}

Repeat, or continue where it stopped:
  {command}

report.html    the result with plots, to be opened in a browser
result.json    the same for machines: metrics and claims (present once the run is finished)
config.json    every setting;  env.json: versions, devices, commit
metrics.jsonl  one line a logged step: {{"step", "t" (Unix seconds), "train/loss", ...}}
samples.jsonl  generated text: {{"step", "prompt", "text"}}
log.txt        notes and warnings
checkpoints/   <step>/{{params,opt_state,data,meta}};  tokenizer/: its files
"""


class Claim(NamedTuple):
    """What a run set out to show: a measured value, its bound, whether `more` or `less` is better, and whether it holds.

    kind: a "gate" must hold (arithmetic, or what is known to be robust), a "finding" is reported either way; low and high are
    the value's interval, where there is one.
    """

    name: str
    value: float | None
    bound: float
    better: str
    holds: bool
    kind: str = "gate"
    low: float | None = None
    high: float | None = None


def bound_text(claim: Mapping[str, Any]) -> str:
    """ ">= 0.2" or "<= 2"."""
    return f"{'>=' if claim['better'] == 'more' else '<='} {claim['bound']:g}"


def interval_text(claim: Mapping[str, Any]) -> str:
    """ " [0.1, 0.3]", or nothing where there is no interval."""
    low, high = claim.get("low"), claim.get("high")
    return "" if low is None or high is None else f" [{low:.3g}, {high:.3g}]"


def at_least(name: str, value: float, bound: float, *, kind: str = "gate", low: Any = None, high: Any = None) -> Claim:
    """The claim value >= bound; a value that is not a number does not hold."""
    return Claim(name, plain(value), bound, "more", bool(value >= bound), kind, plain(low), plain(high))


def at_most(name: str, value: float, bound: float, *, kind: str = "gate", low: Any = None, high: Any = None) -> Claim:
    """The claim value <= bound; a value that is not a number does not hold."""
    return Claim(name, plain(value), bound, "less", bool(value <= bound), kind, plain(low), plain(high))


@dataclass(frozen=True)
class Run:
    """An open run directory. Only the first of several processes writes (`writes`)."""

    workdir: Path
    experiment: str
    config: dict[str, Any]
    command: str = ""
    writes: bool = True
    warnings: list[str] = field(default_factory=list)

    def path(self, *parts: str) -> Path:
        """A path inside the run directory; its parent directories are made."""
        path = self.workdir.joinpath(*parts)
        if self.writes:
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl, handed to the system at once: SIGKILL cannot lose it."""
        numbers = {name: float(value) for name, value in values.items()}
        for name, value in numbers.items():
            if not math.isfinite(value):
                self.warn(f"step {step}: {name} is {value}", once=f"{name} is {value}")
        line = {"step": int(step), "t": round(time.time(), 3)}
        self._append("metrics.jsonl", line | {n: v if math.isfinite(v) else None for n, v in numbers.items()})

    def sample(self, step: int, prompt: str, text: str, **more: Any) -> None:
        """Append a generated text to samples.jsonl."""
        self._append("samples.jsonl", {"step": int(step), "prompt": prompt, "text": text, **plain(more)})

    def figure(self, name: str, svg: str) -> None:
        """Keep a plot as figures/<name>.svg; the report shows it."""
        if self.writes:
            write_atomic(self.path("figures", f"{name}.svg"), svg)

    def note(self, text: str) -> None:
        """Print a line and keep it in log.txt."""
        if self.writes:
            say(text)
            self._append("log.txt", text)

    def warn(self, text: str, *, once: str | None = None) -> None:
        """Print a warning, keep it in log.txt and for the end; those with the same `once` are given once."""
        key = once or text
        if self.writes and not any(key in warning for warning in self.warnings):
            self.warnings.append(text)
            say(colour(f"warning: {text}", "yellow", sys.stderr), stream=sys.stderr)
            self._append("log.txt", f"WARNING {text}")

    def truncate(self, step: int) -> None:
        """Drop metrics and samples after `step`: the resumed run writes them again, each step once."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.workdir / name
            if self.writes and path.exists():
                kept = [row for row in read_jsonl(path) if row["step"] <= step]
                write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))

    def choose(self, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Settings that the run picks itself ({"sft.steps": 900}): made once, kept in config.json.

        When the command is repeated, `launch` puts them into the config before main sees it.
        """
        path = self.workdir / "chosen.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        chosen = plain(dict(make()))
        if self.writes:
            config = dict(flatten(self.config)) | chosen
            write_atomic(path, dump(chosen))
            write_atomic(self.workdir / "config.json", dump(unflatten(config)))
        return chosen

    def finish(
        self, metrics: Mapping[str, Any], claims: Iterable[Claim | Mapping] = (), *, then: str = "", findings: str = ""
    ) -> dict[str, Any]:  # fmt: skip
        """Write result.json and report.html, print claims, verdicts (at most 5) and the next command, repeat the warnings.

        findings: what the numbers say in words, with what did not come out.
        """
        from jaxllm.report import diagnosis
        from jaxllm.report.html import write_report

        seen, healthy = diagnosis.of_run(self.workdir)
        rows = [plain(claim._asdict() if isinstance(claim, Claim) else {"kind": "gate", **claim}) for claim in claims]
        result = {"experiment": self.experiment, "metrics": plain(dict(metrics)), "claims": rows}
        result |= {"findings": findings} if findings else {}
        result |= {"taught_bug": self.config["teach_bug"]} if self.config.get("teach_bug") else {}
        result |= {"verdicts": [verdict._asdict() for verdict in seen]} if seen or healthy else {}
        if self.writes:
            write_atomic(self.workdir / "result.json", dump(result))
            report = write_report(self.workdir)
            for line in claim_lines(rows):
                self.note(line)
            said = [f"verdict  {diagnosis.text(v)}" for v in seen if not v.normal][:5]
            for line in said or [healthy] * bool(healthy):
                self.note(line)
            if findings:
                self.note(findings)
            self.note(f"report   {report}")
            if then:
                self.note(f"next     python -m experiments.{then}")
            rest = len(self.warnings) - 5
            more = [f"{rest} more warnings in {self.workdir / 'log.txt'}"] if rest > 0 else []
            for text in self.warnings[:5] + more:
                say(colour(f"warning: {text}", "yellow", sys.stderr), stream=sys.stderr)
        return result

    def _append(self, name: str, row: Any) -> None:
        """One line, opened and closed: on disk at once, and a truncated file needs no second handle."""
        if not self.writes:
            return
        line = time.strftime("%H:%M:%S ") + clean_message(row) if isinstance(row, str) else clean(json.dumps(row))
        try:
            with open(self.workdir / name, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line + "\n")
        except OSError as error:  # a full disk must not end a long training; its checkpoints will say so
            if name != "log.txt":
                self.warn(f"{self.workdir / name} cannot be written: {error}", once="cannot be written")


# ---- opening


def open_run(
    workdir: Path | str,
    experiment: str,
    config: Mapping[str, Any],
    *,
    command: str = "",
    stage_of: Path | str | None = None,
    writes: bool = True,
) -> Run:
    """Make or reopen a run directory; UserError when it cannot be written or holds another config's run."""
    workdir = Path(workdir)
    check_resume(workdir, experiment, config)
    command = command or f"python -m experiments.{experiment} --workdir={workdir}"
    run = Run(workdir, experiment, redact(dict(config)), clean_message(command), writes)
    if writes:
        make_dir(workdir)
        if (workdir / "config.json").exists():
            run._append("log.txt", f"reopened: {run.command}")
        write_atomic(workdir / "config.json", dump(run.config))
        write_atomic(workdir / "env.json", dump(environment(run, stage_of)))
        write_atomic(workdir / "README.txt", README.format(experiment=experiment, command=run.command))
        if stage_of is None:
            _point_latest(workdir)
    return run


def make_dir(workdir: Path | str) -> None:
    """Make a directory that can be written; UserError says why it cannot."""
    workdir = Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _user_error(f"The run directory {workdir} cannot be written: {error.strerror}. Give another --workdir") from error


def check_resume(workdir: Path | str, experiment: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the run in `workdir` chose itself; UserError when its config is another one."""
    workdir = Path(workdir)
    remember(config, sys.argv)
    begun = ("metrics.jsonl", "chosen.json", "result.json")
    if not (workdir / "config.json").exists() or not any((workdir / name).exists() for name in begun):
        return {}  # nothing was trained yet: a run that was refused may be given other settings
    stored, env, chosen = (read_json(workdir / name) for name in ("config.json", "env.json", "chosen.json"))
    if (before := env.get("experiment", experiment)) != experiment:
        raise _user_error(f"Cannot resume {workdir}: it is a run of {before}, not {experiment}. {_ELSEWHERE}")
    old, new = dict(flatten(stored)), dict(flatten(plain(redact(dict(config)))))
    for name, value in chosen.items():
        new[name] = new.get(name) or value  # not given again: what was chosen stays
    changed = [
        f"{name} was {_shown(old, name)}, now {_shown(new, name)}"
        for name in sorted(old.keys() | new.keys())
        if name not in RESUMABLE and not name.startswith("mesh.") and _shown(old, name) != _shown(new, name)
    ]
    if changed:
        raise _user_error(
            f"Cannot resume {workdir}: {'; '.join(changed)}. "
            f"Only {', '.join(RESUMABLE)} and the mesh may change on resume. {_ELSEWHERE}"
        )
    return chosen


_ELSEWHERE = "To start a new run, give another --workdir"


@contextlib.contextmanager
def lock(workdir: Path | str) -> Iterator[None]:
    """Hold a run directory; UserError names the process that has it. A killed process holds nothing."""
    try:
        import fcntl
    except ImportError:  # no advisory locks on this system
        yield
        return
    with open(Path(workdir) / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip()
            raise _user_error(f"{workdir} is in use by {holder}: wait, or give another --workdir") from error
        except OSError:  # a file system without locks
            pass
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
        file.flush()
        yield


def environment(run: Run, stage_of: Path | str | None) -> dict[str, Any]:
    """What env.json holds: versions, devices, commit, and the variables named in ENVIRONMENT, no others."""
    import jax

    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    kinds = [device.device_kind for device in jax.devices()]
    return {
        "experiment": run.experiment,
        "command": run.command,
        "argv": [clean_message(arg) for arg in sys.argv],
        "stage_of": None if stage_of is None else str(stage_of),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "time": round(time.time(), 3),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": versions,
        "devices": {kind: kinds.count(kind) for kind in kinds},
        "processes": jax.process_count(),
        "git": _commit(),
        "environment": {n: os.environ[n] for n in ENVIRONMENT if n in os.environ},
    }


def _commit() -> str | None:
    """The commit this code stands at, with -dirty when files differ; None outside a repository."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        quiet = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # never in the way of a commit being made
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=quiet)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _point_latest(workdir: Path) -> None:
    """runs/latest -> the newest run under a directory named runs."""
    link = workdir.parent / "latest"
    if workdir.parent.name == "runs" and (link.is_symlink() or not link.exists()):
        with contextlib.suppress(OSError):
            link.unlink(missing_ok=True)
            link.symlink_to(workdir.name)


# ---- reading and writing


def finished(workdir: Path | str) -> dict[str, Any] | None:
    """The result.json of a finished run, None when there is none."""
    path = Path(workdir) / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def report_of(workdir: Path | str) -> Path:
    """Where the report is; written now when it is missing."""
    path = Path(workdir) / "report.html"
    if not path.exists():
        from jaxllm.report.html import write_report

        write_report(Path(workdir))
    return path


def claim_lines(claims: Iterable[Mapping[str, Any]]) -> list[str]:
    """A printed line for each claim."""
    lines = []
    for claim in claims:
        value = claim["value"]
        shown = f"{value:.4g}" if isinstance(value, (int, float)) else str(value)
        mark = "holds" if claim["holds"] else "FAILS" if claim["kind"] == "gate" else "no   "
        lines.append(f"  {mark}  {claim['name']}: {shown}{interval_text(claim)} ({bound_text(claim)})")
    return lines


def _shown(flat: Mapping[str, Any], name: str) -> str:
    return json.dumps(flat[name]) if name in flat else "not there"


def _user_error(message: str) -> Exception:
    from jaxllm.core.types import UserError

    return UserError(message)
