"""Where requests wait for the worker: what is wanted, what is told, and the queue between them."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import NamedTuple


class Wanted(NamedTuple):
    """One completion to make. Row `row` of a prompt's completions draws what row `row` of `decode.generate` draws; top_k 0: all;
    tops: the most likely alternatives are told too."""

    prompt: tuple[int, ...]
    limit: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    row: int = 0
    tops: bool = False


class Told(NamedTuple):
    """What the worker says of a completion: a token (None: a stop token ended it), and on the last one how it ended."""

    index: int
    token: int | None
    logp: float = 0.0
    tops: tuple[tuple[int, float], ...] = ()
    finish: str | None = None  # "stop", "length", "error"


class Seat(NamedTuple):
    """A completion's place in the queue: where its tokens are told, and whether its reader has left."""

    index: int
    wanted: Wanted
    out: SimpleQueue
    gone: threading.Event


class Full(Exception):
    """The queue has no room for a request."""


@dataclass(frozen=True)
class Desk:
    """What request threads and the worker share; `changed` guards it. seated: slot -> (seat, tokens told)."""

    most: int
    waiting: deque[Seat] = field(default_factory=deque)
    seated: dict[int, tuple[Seat, int]] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)
    closing: threading.Event = field(default_factory=threading.Event)


def submit(desk: Desk, wanted: list[Wanted], out: SimpleQueue) -> list[Seat]:
    """Seats for completions that are told to `out`, number i as index i. Full when not all of them can wait."""
    seats = [Seat(i, w, out, threading.Event()) for i, w in enumerate(wanted)]
    with desk.changed:
        for seat in [seat for seat in desk.waiting if seat.gone.is_set()]:  # nobody waits for these
            desk.waiting.remove(seat)
        if desk.closing.is_set() or len(desk.waiting) + len(seats) > desk.most:
            raise Full
        desk.waiting.extend(seats)
        desk.changed.notify()
    return seats


def close(desk: Desk) -> None:
    """Ends the worker; whoever waits is told."""
    desk.closing.set()
    with desk.changed:
        desk.changed.notify()


def fail(desk: Desk, *, waiting: bool) -> None:
    """Those in work, and with `waiting` those in the queue too, are told that it went wrong."""
    with desk.changed:
        seats = [seat for seat, _ in desk.seated.values()] + (list(desk.waiting) if waiting else [])
        desk.seated.clear()
        if waiting:
            desk.waiting.clear()
    for seat in seats:
        seat.out.put(Told(seat.index, None, finish="error"))
