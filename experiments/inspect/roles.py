"""Whose words a row's tokens are: conversations are encoded again and looked for among its segments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from experiments.inspect.tokens import IMAGE, Part, Token
from jaxllm.core.types import UserError
from jaxllm.data import chat


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
    return [t if t.id == IMAGE else t._replace(role=role) for t, role in zip(part.tokens, roles, strict=True)]


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
