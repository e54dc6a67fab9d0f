"""A request's completions as pieces of text, while the worker draws their tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from experiments.serve.ask import Asked
from experiments.serve.desk import Desk, Full, Told, Wanted, submit
from experiments.serve.fields import Refused
from jaxllm.generate import text

POLL = 0.25  # seconds between two looks at whether the client is still there


class Gone(Exception):
    """The client has left."""


class Piece(NamedTuple):
    """What is new of completion `index`: its text, its tokens, and how it ended, if it did."""

    index: int
    text: str
    tokens: tuple[Told, ...]
    finish: str | None


class _Choice(NamedTuple):
    """tail: the tokens whose text is not complete; held: text in which a stop sequence may begin."""

    tail: text.Tail = text.Tail()
    held: str = ""


def wanted(asked: Asked) -> list[Wanted]:
    """The completions of a request: n of each prompt, as neighbours."""
    same = (asked.limit, asked.temperature, asked.top_k, asked.top_p, asked.seed)
    return [Wanted(prompt, *same, row, bool(asked.tops)) for prompt in asked.prompts for row in range(asked.n)]


@contextmanager
def follow(desk: Desk, asked: Asked, tokenizer: Any, alive: Callable[[], bool]) -> Iterator[Iterator[Piece]]:
    """An iterator of pieces until every completion has ended; its rows are free when the context ends.

    Refused: the queue is full (on entering), or the device failed. Gone: alive() says that nobody listens.
    """
    out: SimpleQueue[Told] = SimpleQueue()
    try:
        seats = submit(desk, wanted(asked), out)
    except Full:
        message = f"{len(desk.waiting)} completions wait already: try again later"
        raise Refused(429, message, code="queue_full") from None
    try:
        yield _pieces(seats, out, asked, tokenizer, alive)
    finally:
        for seat in seats:
            seat.gone.set()


def _pieces(seats: list, out: SimpleQueue, asked: Asked, tokenizer: Any, alive: Callable[[], bool]) -> Iterator[Piece]:
    choices = dict.fromkeys(range(len(seats)), _Choice())
    while choices:
        told = _next(out, alive)
        if told.index not in choices:  # drawn after its stop sequence was met
            continue
        if told.finish == "error":
            raise Refused(500, "the server stopped or failed on this request: its log says which")
        choices[told.index], piece = _advance(choices[told.index], told, asked.stops, tokenizer.decode)
        if piece.finish:
            seats[told.index].gone.set()
            del choices[told.index]
        yield piece


def _next(out: SimpleQueue, alive: Callable[[], bool]) -> Told:
    """The next token; Gone when the client has left."""
    while alive():
        try:
            return out.get(timeout=POLL)
        except Empty:
            continue
    raise Gone


def _advance(choice: _Choice, told: Told, stops: tuple[str, ...], decode: text.Decode) -> tuple[_Choice, Piece]:
    """The choice with a token more, and what can be shown."""
    tail, new = choice.tail, ""
    if told.token is not None:
        tail, new = text.add(decode, tail, told.token)
    if told.finish:
        new += text.rest(decode, tail)
        tail = text.Tail()
    shown, held, met = text.before_stop(choice.held + new, stops)
    if told.finish and not met:
        shown, held = shown + held, ""
    tokens = () if told.token is None else (told,)
    return _Choice(tail, held), Piece(told.index, shown, tokens, "stop" if met else told.finish)
