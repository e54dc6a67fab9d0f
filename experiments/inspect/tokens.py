"""Rows of columns as tokens with what training knows of each: role, segment, position, and what it weighs in the loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxllm.core.types import UserError
from jaxllm.data import chat


class Token(NamedTuple):
    """weight: in the loss, 0 where the token is not trained; note: what else is known of it."""

    id: int
    text: str
    role: str
    segment: int
    position: int
    weight: float = 0.0
    note: str = ""


class Part(NamedTuple):
    """One sequence of a row: a side of a pair, a completion. padding: positions behind its end; facts: reward and the like."""

    name: str
    tokens: list[Token]
    padding: int = 0
    facts: str = ""


class Shown(NamedTuple):
    """A row."""

    title: str
    parts: list[Part]
    answer: str = ""


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
        for position, (token, w, note) in enumerate(zip(ids, weights, said, strict=True)):
            tokens.append(Token(token, tokenizer.piece(token), "text", segment, position, float(w), note))
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
    numbered = enumerate(zip(ids, at, strict=True))
    return Part(name, [Token(int(t), tokenizer.piece(int(t)), "text", int(s), i) for i, (t, s) in numbered])


# ---- roles


def segments_of(part: Part) -> list[tuple[int, ...]]:
    """The ids of each of a part's segments."""
    return [tuple(t.id for t in part.tokens if t.segment == segment) for segment in dict.fromkeys(t.segment for t in part.tokens)]


def with_roles(parts: list[Part], tokenizer: Any, conversations: Iterable[Any], length: int, prompt: bool) -> list[Part]:
    """The parts with the roles of the conversations that their segments are; a segment that is none's stays text.

    Conversations are encoded again until all are found. length: where rows were cut, 0 for nowhere; prompt: they end with the
    opening of the assistant's turn.
    """
    wanted, found = {ids for part in parts for ids in segments_of(part)}, {}
    for messages in conversations:
        if not wanted - found.keys():
            break
        whole = chat.encode_chat(tokenizer, messages, generation_prompt=prompt).tokens.tolist()
        ids = tuple(whole[: length + 1] if length else whole)
        if ids in wanted:
            found[ids] = _roles(tokenizer, messages, len(whole))[: len(ids)]
    return [part._replace(tokens=_renamed(part, found)) for part in parts]


def _renamed(part: Part, found: Mapping[tuple[int, ...], list[str]]) -> list[Token]:
    roles = [role for ids in segments_of(part) for role in found.get(ids, ["text"] * len(ids))]
    return [token._replace(role=role) for token, role in zip(part.tokens, roles, strict=True)]


def _roles(tokenizer: Any, messages: Any, n: int) -> list[str]:
    """A role for each of n tokens: a prefix of the messages encodes to a prefix of the tokens."""
    roles: list[str] = []
    for i, message in enumerate(messages):
        try:
            end = len(chat.encode_chat(tokenizer, messages[: i + 1]).tokens)
        except UserError:  # a template that takes no conversation without an answer
            continue
        roles += [message["role"]] * (end - len(roles))
    return (roles + ["assistant"] * n)[:n]
