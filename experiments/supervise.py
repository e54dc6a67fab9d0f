"""Start a command again whenever it ends in a way that a restart cures: stopped, hung, aborted or killed.

    python -m experiments.supervise -- python -m experiments.pretrain --workdir=runs/long --config.steps=100000
    python -m experiments.supervise --restarts=10 -- python -m experiments.grpo --workdir=runs/rl --config.init=runs/sft

Codes 75, 134 and 137 (or the signals SIGABRT and SIGKILL) start it again, after 1, 2, 4, ... seconds, a minute at most; every
other code ends it, and is the supervisor's own. It gives up after --restarts restarts in a row that brought no new checkpoint.
SIGTERM and Ctrl-C are handed on once; then it waits for the command and ends with its code. The command must name --workdir.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

AGAIN = {75: "it was stopped, hung, or lost a peer", 134: "it was aborted", 137: "it was killed"}
MOST = 60.0  # seconds to wait before a restart
RESTARTS = 5


def progress(workdir: Path) -> tuple:
    """What changes when a run gets on: its checkpoints, and the results of its stages."""
    steps = {str(p.relative_to(workdir)) for p in workdir.rglob("checkpoints/*") if p.name.isdigit()}
    return tuple(sorted(steps | {str(p.relative_to(workdir)) for p in workdir.rglob("result.json")}))


def exit_code(returned: int) -> int:
    """As a shell gives it: 128 + the signal's number."""
    return 128 - returned if returned < 0 else returned


def supervise(
    command: Sequence[str], workdir: Path, restarts: int, *, sleep: Callable[[float], None] | None = None,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> int:  # fmt: skip
    """Run the command until it ends for good; its last exit code."""
    asked: list[int] = []
    child: subprocess.Popen | None = None

    def hand_on(number: int, frame: object) -> None:
        asked.append(number)
        if child is not None:
            child.send_signal(number)

    old = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    idle = 0
    try:
        while True:
            before = progress(workdir)
            child = subprocess.Popen(command, start_new_session=True)  # a Ctrl-C of the terminal reaches it through us, once
            if asked:
                child.send_signal(asked[-1])
            code = exit_code(child.wait())
            if code not in AGAIN or asked:
                return code
            idle = 0 if progress(workdir) != before else idle + 1
            if idle > restarts:
                say(f"supervisor: code {code} again, and no new checkpoint in {restarts} restarts: giving up")
                return code
            pause = min(MOST, 2.0**idle)
            say(f"supervisor: {AGAIN[code]} (code {code}); starting again in {pause:.0f} s")
            (sleep or partial(_rest, asked))(pause)
            if asked:
                return code
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _rest(asked: Sequence[int], seconds: float) -> None:
    """Sleep, but not through a signal."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not asked:
        time.sleep(0.1)


def parse(argv: Sequence[str]) -> tuple[list[str], Path, int]:
    """(command, its run directory, restarts) of the arguments; ValueError says what is missing."""
    if "--" not in argv:
        raise ValueError("give the command after --:  -- python -m experiments.pretrain --workdir=DIR")
    cut = list(argv).index("--")
    own, command = argv[:cut], list(argv[cut + 1 :])
    restarts = RESTARTS
    for word in own:
        name, _, value = word.partition("=")
        if name != "--restarts" or not value.isdigit():
            raise ValueError(f"unknown argument {word!r}: only --restarts=N may stand before --")
        restarts = int(value)
    if not command:
        raise ValueError("there is no command after --")
    named = [i for i, word in enumerate(command) if word.lstrip("-").partition("=")[0] == "workdir"]
    if not named:
        raise ValueError(
            f"the command must name its run directory with --workdir=DIR, or each start is a new run: {shlex.join(command)}"
        )
    _, equals, value = command[named[-1]].partition("=")
    return command, Path(value if equals else command[named[-1] + 1]), restarts


def main(argv: Sequence[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    try:
        command, workdir, restarts = parse(argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return supervise(command, workdir, restarts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
