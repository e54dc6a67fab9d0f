"""What ended a run, as a line and an exit code.

0 done, 2 user error, 70 bug or numbers that are not finite, 74 disk, 75 stopped and resumable, 130 interrupted by hand, 141 the
reader of what a tool prints has gone.
"""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxllm.core.types import UserError
from jaxllm.report.console import say, unread
from jaxllm.report.files import write_atomic
from jaxllm.report.secrets import clean_message

UNREAD = 141  # what a shell says of a command that SIGPIPE ended: `| head` has read what it wanted
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
DISK_WORDS = ("No space left on device", "Disk quota exceeded", "File too large")


def guard(work: Callable[[], Any], workdir: Path | None, command: str, *, debug: bool = False) -> int:
    """Run `work` and turn what it raises into a short message and an exit code."""
    try:
        work()
        return UNREAD if unread(sys.stdout) else 0
    except KeyboardInterrupt:
        say(f"\nInterrupted. Continue with:  {command}", stream=sys.stderr)
        return 130
    except SystemExit as stop:
        if stop.code == 75:
            say(f"Stopped. Continue with:  {command}", stream=sys.stderr)
        raise
    except Exception as error:
        if isinstance(error, BrokenPipeError) and unread(sys.stdout):
            return UNREAD
        if debug:
            say_traceback()
        return _code_of(error, workdir, command, debug)


def _code_of(error: Exception, workdir: Path | None, command: str, debug: bool) -> int:
    from jaxllm.train.guard import NonFinite

    if isinstance(error, UserError):
        return user_error(error, error.code)
    if isinstance(error, NonFinite):
        return user_error(" ".join([str(error), *getattr(error, "__notes__", [])]), 70)
    if _lost_peer(error):
        text = str(error).splitlines()[0][:200]
        say(f"error: another process of this run was lost ({text}). Continue with:  {command}", stream=sys.stderr)
        return 75
    if getattr(error, "errno", None) in DISK_ERRORS or any(words in str(error) for words in DISK_WORDS):
        where = f" ({_free(workdir)})" if workdir and "free under" not in str(error) else ""
        say(f"error: the disk failed: {error}{where}. Make room, then continue with:  {command}", stream=sys.stderr)
        return 74
    from jaxllm.train import fit_memory

    if (said := fit_memory.exhausted(error)) is not None:
        return user_error(UserError(said))
    if not debug:
        say_traceback()
    where = _write_crash(workdir, command)
    say(f"error: this is a bug ({type(error).__name__}: {error}).{where}", stream=sys.stderr)
    return 70


def _free(workdir: Path) -> str:
    from jaxllm.train import manifest

    return f"{manifest.shown(manifest.room(Path(workdir)))} are free under {workdir}"


def say_traceback() -> None:
    say(traceback.format_exc().rstrip("\n"), stream=sys.stderr)  # without secrets, as all that is said


def _write_crash(workdir: Path | None, command: str) -> str:
    if workdir is None:
        return ""
    try:
        path = Path(workdir) / "crash" / "traceback.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, clean_message(f"{command}\n\n{traceback.format_exc()}"))
    except OSError:
        return ""
    return f" Traceback: {path}"


def user_error(error: Exception | str, code: int = 2) -> int:
    for line in str(error).splitlines():
        say(f"error: {line}", stream=sys.stderr)
    return code


def _lost_peer(error: Exception) -> bool:
    from jaxllm.train import processes

    return processes.lost_peer(error)
