"""What SIGTERM and Ctrl-C do: the loop saves first, all else ends by an exception; a second signal waits for nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import NoReturn

CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}


def end(number: int) -> NoReturn:
    """SystemExit(75) for SIGTERM (preempted: the same command continues), KeyboardInterrupt for Ctrl-C."""
    if number == signal.SIGTERM:
        raise SystemExit(CODES[number])
    raise KeyboardInterrupt


# what a second signal does in the loop: a notebook's process must live on, a command's need not
hurry: ContextVar[Callable[[int], NoReturn]] = ContextVar("hurry", default=end)


@contextlib.contextmanager
def noted() -> Iterator[list[int]]:
    """A list that the first signal makes non-empty; what comes then is `hurry`. Empty for ever off the main thread."""
    requests: list[int] = []

    def note(number: int, frame: object) -> None:
        if requests:
            hurry.get()(number)
        requests.append(number)

    with _handled(note, CODES):
        yield requests


@contextlib.contextmanager
def of_command(command: str, *, alone: bool) -> Iterator[None]:
    """The signals of a process that is a run's own: the first ends it, with 75 or 130, and the second at once.

    At once is as safe as SIGKILL: what is half written is ignored by the next start. alone: with other processes SIGTERM keeps
    its default, because one that waits for a peer, in C, would never come to a handler.
    """
    asked: list[int] = []

    def at_once(number: int) -> NoReturn:
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(), f"\nStopped at once. Continue with:  {command}\n".encode())
        os._exit(CODES[signal.Signals(number)])

    def stop(number: int, frame: object) -> None:
        if asked:
            at_once(number)
        asked.append(number)
        end(number)

    token = hurry.set(at_once)
    try:
        with _handled(stop, CODES if alone else [signal.SIGINT]):
            yield
    finally:
        hurry.reset(token)


@contextlib.contextmanager
def _handled(handler: Callable[[int, object], None], numbers: object) -> Iterator[None]:
    try:
        old = {number: signal.signal(number, handler) for number in numbers}
    except ValueError:  # not the main thread
        old = {}
    try:
        yield
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
