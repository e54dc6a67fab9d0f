"""CodeRunner: model code in a fresh process, shut in by a tier, bounded in time, memory, processes and output.

What the process prints is an output like any other and never a verdict: `call` sends inputs in and takes JSON values out on a
pipe of their own, each marked with a nonce, and whoever called compares them. Expected outputs never enter the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.generate.sandbox import tiers

STARTUP = 20.0  # seconds until the candidate begins: later is a failure of this machine, not of the candidate
CHILD = Path(__file__).with_name("child.py").read_text(encoding="utf-8")


class Limits(NamedTuple):
    """Of one process tree. seconds: wall clock; memory (of a process), file, output (of stdout and of stderr), result: bytes."""

    seconds: float = 5.0
    memory: int = 2**29
    processes: int = 16
    file: int = 2**23
    output: int = 2**16
    result: int = 2**20


class Outcome(NamedTuple):
    """How one process ended. kind: "ended" (by itself or a signal), "timeout", "overflow" (of output), "failure" (of ours: the
    candidate never began). values: for every input (value, "") or (None, what went wrong). code: its exit code, None when it
    was ended. reason: in words, "" when it ended by itself."""

    kind: str
    values: tuple[tuple[Any, str], ...]
    stdout: str
    stderr: str
    code: int | None
    reason: str


class CodeRunner(NamedTuple):
    """tier: its name; call(source, function, inputs): the function of the source on each input (a list: its arguments);
    program(source, stdin): the source as a program. Both may be called from several threads."""

    tier: str
    call: Callable[[str, str, Sequence[Any]], Outcome]
    program: Callable[[str, str], Outcome]


def make(tier: str = "auto", *, unsafe_local: bool = False, limits: Limits | None = None) -> CodeRunner:
    """A runner of the tier: "auto" (bwrap, else unshare), "bwrap", "unshare", or "rlimits" with unsafe_local.

    UserError when the tier cannot be had here; a line on stderr says what other tiers than bwrap leave open.
    """
    chosen = tiers.choose(tier, works, unsafe_local=unsafe_local)
    if chosen.about:
        print(f"warning: tier {chosen.name}: {chosen.about}", file=sys.stderr)
    return of(chosen, limits or Limits())


def of(tier: tiers.Tier, limits: Limits) -> CodeRunner:
    """The runner of a tier, asked of nobody."""

    def call(source: str, function: str, inputs: Sequence[Any]) -> Outcome:
        return run(tier, limits, {"source": source, "function": function, "inputs": list(inputs)}, "")

    def program(source: str, stdin: str = "") -> Outcome:
        return run(tier, limits, {"source": source, "function": None}, stdin)

    return CodeRunner(tier.name, call, program)


def works(tier: tiers.Tier) -> str:
    """Why a tier does not run here, "" when it does: tried with one call."""
    outcome = run(tier, Limits(), {"source": "def f(x):\n    return x + 1", "function": "f", "inputs": [1]}, "")
    if outcome.values == ((2, ""),):
        return ""
    return f"does not start ({' '.join((outcome.reason + ' ' + outcome.stderr).split())[-200:]})"


def run(tier: tiers.Tier, limits: Limits, request: dict[str, Any], stdin: str) -> Outcome:
    """One candidate from its start to the end of all its processes."""
    nonce = secrets.token_hex(16)
    uid = tiers.new_uid()
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(_home(uid))
        given = _file(stack, json.dumps({**request, "nonce": nonce}))
        typed = _file(stack, stdin)
        reader, writer = os.pipe()
        stack.callback(os.close, reader)
        plan = _plan(tier, limits, uid, home, given, writer)
        try:
            process = subprocess.Popen(
                [*tier.prefix(home), tiers.python(), "-P", "-s", "-S", "-c", CHILD, json.dumps(plan)],
                stdin=typed, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=(given, writer), cwd="/",
                start_new_session=True, env=_environment(tier.inside(home)),
            )  # fmt: skip
        except OSError as error:
            return Outcome("failure", _values([], request), "", "", None, f"it could not be started: {error}")
        finally:
            os.close(writer)
        stack.callback(_end, process, tier, uid)
        return _outcome(process, reader, limits, request, nonce.encode())


def _plan(tier: tiers.Tier, limits: Limits, uid: int | None, home: str, given: int, writer: int) -> dict[str, Any]:
    """What the child is told; RLIMIT_NPROC counts all of a user's threads where the user is ours and nothing shuts it in."""
    caps = {
        "RLIMIT_CORE": 0, "RLIMIT_AS": limits.memory, "RLIMIT_FSIZE": limits.file, "RLIMIT_NPROC": limits.processes,
        "RLIMIT_CPU": int(limits.seconds) + 2, "RLIMIT_NOFILE": 64,
    }  # fmt: skip
    alone = uid is not None or tier.namespaced
    return {"limits": caps, "uid": uid, "home": tier.inside(home), "request": given, "result": writer, "count_others": not alone}


def _environment(home: str) -> dict[str, str]:
    """All of it. Sets have the same order in every run; `-I` would forbid that and differs in nothing else here."""
    return {"HOME": home, "TMPDIR": home, "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}


@contextlib.contextmanager
def _home(uid: int | None) -> Iterator[str]:
    """A directory of the program's own; nothing of it stays, however deep or locked what it holds is."""
    home = tempfile.mkdtemp(prefix="jaxllm-code-")
    try:
        if uid is not None:
            os.chown(home, uid, uid)
        yield home
    finally:
        try:
            shutil.rmtree(home)
        except (OSError, RecursionError):  # these two go as deep as it takes, and follow no links
            for words in (("chmod", "-R", "u+rwx"), ("rm", "-rf")):
                subprocess.run([*words, "--", home], capture_output=True, timeout=STARTUP)


def _file(stack: contextlib.ExitStack, text: str) -> int:
    """A descriptor of an unnamed file with this text."""
    file = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 the stack closes it
    file.write(text.encode("utf-8", "replace"))
    file.flush()
    file.seek(0)
    return file.fileno()


# ---- while it runs


def _outcome(process: subprocess.Popen, reader: int, limits: Limits, request: dict[str, Any], nonce: bytes) -> Outcome:
    streams = {process.stdout.fileno(): limits.output, process.stderr.fileno(): limits.output, reader: limits.result}
    data = {fd: bytearray() for fd in streams}
    kind = _follow(process, streams, data, reader, nonce, limits.seconds)
    out, err, result = (bytes(data[fd]) for fd in streams)
    frames = _frames(result, nonce)
    code = process.poll() if kind == "ended" else None
    reason = ""
    if not frames:
        kind, reason = "failure", f"it did not begin (exit code {process.poll()})"
    elif kind != "ended":
        reason = f"took over {limits.seconds:g} seconds" if kind == "timeout" else f"wrote over {limits.output:,} bytes"
    shown = [text[: limits.output].decode("utf-8", "replace") for text in (out, err)]
    return Outcome(kind, _values(frames, request), *shown, code, reason)


def _follow(
    process: subprocess.Popen, caps: dict[int, int], data: dict[int, bytearray], result: int, nonce: bytes, seconds: float
) -> str:
    """Read until all is closed, the process is gone, time is up or a stream is over its cap; then its group is killed."""
    deadline, begun = time.monotonic() + STARTUP, False
    with selectors.DefaultSelector() as selector:
        for fd in caps:
            selector.register(fd, selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return _kill(process, "timeout" if process.poll() is None else "ended")
            for key, _ in selector.select(min(left, 0.05)):
                block = os.read(key.fd, 1 << 16)
                data[key.fd] += block
                if len(data[key.fd]) > caps[key.fd]:
                    return _kill(process, "overflow")
                if not block:
                    selector.unregister(key.fd)
            if not begun and nonce in data[result]:
                begun, deadline = True, time.monotonic() + seconds
            if process.poll() is not None:  # what it left behind may hold the pipes
                _kill(process, "")
                deadline = min(deadline, time.monotonic() + 0.2)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, deadline - time.monotonic()))
        return _kill(process, "ended")
    return _kill(process, "timeout")


def _kill(process: subprocess.Popen, kind: str) -> str:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    return kind


def _end(process: subprocess.Popen, tier: tiers.Tier, uid: int | None) -> None:
    """Nothing of it is left: the group, and what left the group, which a namespace or a user of its own tells."""
    _kill(process, "")
    process.wait()
    process.stdout.close()
    process.stderr.close()
    if uid is not None and not tier.namespaced:
        rest = f"import os; u = {uid}; os.setgroups([]); os.setresgid(u, u, u); os.setresuid(u, u, u); os.kill(-1, 9)"
        subprocess.run([tiers.python(), "-I", "-S", "-c", rest], capture_output=True, timeout=STARTUP)


# ---- what it said


def _frames(data: bytes, nonce: bytes) -> list[dict[str, Any]]:
    """The whole lines that begin with the nonce and hold a JSON object."""
    found = []
    for line in data.split(b"\n")[:-1]:
        if line.startswith(nonce):
            with contextlib.suppress(ValueError, RecursionError):
                frame = json.loads(line[len(nonce) :], parse_constant=_refuse)
                found += [frame] if isinstance(frame, dict) else []
    return found


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def _values(frames: Sequence[dict[str, Any]], request: dict[str, Any]) -> tuple[tuple[Any, str], ...]:
    """(value, "") or (None, why) for every input, by the first frame of its number."""
    given: dict[Any, dict[str, Any]] = {}
    for frame in frames:
        if isinstance(frame.get("i"), int):
            given.setdefault(frame["i"], frame)
    whole = next((str(frame["error"]) for frame in frames if "i" not in frame and "error" in frame), "it gave no value")
    answers = [given.get(i, {"error": whole}) for i in range(len(request.get("inputs", ())))]
    return tuple((a["value"], "") if "value" in a else (None, str(a.get("error", whole))[:300]) for a in answers)
