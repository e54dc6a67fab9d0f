"""Rows of columns as tokens with what training knows of each: role, segment, position, and what it weighs in the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

IMAGE = -1  # the id of an image, which is no token


class Token(NamedTuple):
    """weight: in the loss, 0 where the token is not trained; note: what else is known of it; id: IMAGE where an image stands."""

    id: int
    text: str
    role: str
    segment: int
    position: int
    weight: float = 0.0
    note: str = ""


class Part(NamedTuple):
    """One sequence of a row: a side of a pair, a completion. padding: positions behind its end; facts: reward and the like.

    pictures: PNG files of its images.
    """

    name: str
    tokens: list[Token]
    padding: int = 0
    facts: str = ""
    pictures: tuple[bytes, ...] = ()

    @property
    def size(self) -> str:
        """57 tokens, 18 trained."""
        real = [t for t in self.tokens if t.id != IMAGE]
        images = len(self.tokens) - len(real)
        said = f"{len(real):,} tokens, {sum(t.weight != 0 for t in real):,} trained"
        return said + f", {images} image{'s' * (images > 1)}" * bool(images)


def cut(tokens: Sequence[Token], most: int) -> tuple[Sequence[Token], int, Sequence[Token]]:
    """(the first, how many are left out, the last): at most `most` tokens, both ends of a long sequence."""
    if len(tokens) <= most:
        return tokens, 0, ()
    return tokens[: most // 2], len(tokens) - most, tokens[len(tokens) - (most - most // 2) :]


class Shown(NamedTuple):
    """A row."""

    title: str
    parts: list[Part]
    answer: str = ""


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token; a tokenizer of words, which keeps no spaces, has one before each word but the first."""
    found = [tokenizer.piece(int(i)) for i in ids]
    spaced = tokenizer.decode([0, 1]) == f"{tokenizer.piece(0)} {tokenizer.piece(1)}"
    return [found[0], *(" " + piece for piece in found[1:])] if spaced and found else found


def sequence(tokenizer: Any, row: Any, name: str = "", notes: Sequence[str] | None = None, facts: str = "") -> Part:
    """A sequence record's row: of each segment its first token, then its targets, which are what may be trained.

    notes: one a position, of the target there.
    """
    weight = np.asarray(row.get("weights", row["mask"]), np.float64) * np.asarray(row["mask"])
    tokens: list[Token] = []
    for segment in [int(s) for s in np.unique(row["segments"]) if s]:
        at = np.flatnonzero(row["segments"] == segment)
        ids = [int(row["tokens"][at[0]]), *row["targets"][at].tolist()]
        weights, said = [0.0, *weight[at]], ["", *([""] * len(at) if notes is None else [notes[i] for i in at])]
        for position, (token, text, w, note) in enumerate(zip(ids, pieces(tokenizer, ids), weights, said, strict=True)):
            tokens.append(Token(token, text, "text", segment, position, float(w), note))
    return Part(name, tokens, int((row["segments"] == 0).sum()), facts)


def corrupted(tokenizer: Any, row: Mapping[str, np.ndarray]) -> Part:
    """A row of masked language modelling: what the model reads; at chosen positions it is to say what stood there."""
    inputs, chosen = row.get("inputs", row["tokens"]), row.get("chosen", np.zeros(len(row["tokens"]), bool))
    tokens, starts = [], {}
    for i in np.flatnonzero(row["segments"]):
        segment, told = int(row["segments"][i]), f"target {tokenizer.piece(int(row['tokens'][i]))!r}" if chosen[i] else ""
        position = i - starts.setdefault(segment, i)
        id_ = int(inputs[i])
        tokens.append(Token(id_, tokenizer.piece(id_), "text", segment, int(position), float(chosen[i]), told))
    return Part("", tokens, int((row["segments"] == 0).sum()))


def given(tokenizer: Any, ids: Sequence[int], name: str, segments: Sequence[int] | None = None) -> Part:
    """Tokens that are only read: a prompt, an encoder's inputs."""
    at = [1] * len(ids) if segments is None else segments
    numbered = enumerate(zip(ids, pieces(tokenizer, ids), at, strict=True))
    return Part(name, [Token(int(t), text, "text", int(s), i) for i, (t, text, s) in numbered])


def with_images(part: Part, source: Mapping[str, np.ndarray], segments: np.ndarray, pictures: Sequence[bytes]) -> Part:
    """The part of a row with its images where text sees them first: before the position in the row that `starts` names."""
    tokens = list(part.tokens)
    for i in reversed(np.flatnonzero(source["segments"])):
        segment = int(source["segments"][i])
        position = int(source["starts"][i]) - int(np.flatnonzero(segments == segment)[0])
        at = next((k for k, t in enumerate(tokens) if t.segment == segment and t.position >= position), len(tokens))
        size = " x ".join(str(n) for n in source["pixels"][i].shape)
        note = "no token: every token from here to the next image looks at it"
        tokens.insert(at, Token(IMAGE, f"[image {i + 1}: {size}]", "image", segment, position, 0.0, note))
    return part._replace(tokens=tokens, pictures=tuple(pictures))
