"""Text from tokens as they come: whole characters only, and nothing of what may become a stop sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

Decode = Callable[[Sequence[int]], str]


class Tail(NamedTuple):
    """The tokens that matter for the text of the next one: the last that were shown, and those whose text is not yet."""

    shown: tuple[int, ...] = ()
    pending: tuple[int, ...] = ()


def add(decode: Decode, tail: Tail, token: int) -> tuple[Tail, str]:
    """(the tail with one token more, the text that it makes certain). Texts and `rest` together are decode of all tokens."""
    pending = (*tail.pending, token)
    text = rest(decode, Tail(tail.shown, pending))
    # decoding begins at tokens that were shown: some tokenizers drop a space at the beginning
    if text and not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
        return Tail(pending), text
    return Tail(tail.shown, pending), ""


def rest(decode: Decode, tail: Tail) -> str:
    """The text of the pending tokens, as far as it is any."""
    return decode((*tail.shown, *tail.pending))[len(decode(tail.shown)) :]


def before_stop(text: str, stops: Sequence[str]) -> tuple[str, str, bool]:
    """(what can be shown, what must wait since a stop may begin there, whether a stop was met: it and all behind it are gone)."""
    if found := [at for stop in stops if (at := text.find(stop)) >= 0]:
        return text[: min(found)], "", True
    longest = max(map(len, stops), default=1) - 1
    for n in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-n:]) for stop in stops):
            return text[:-n], text[-n:], False
    return text, "", False
