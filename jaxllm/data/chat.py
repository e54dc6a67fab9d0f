"""Conversations as tokens: role checks, the chat template, and which tokens are trained.

A conversation is a list of {"role", "content"}. The template only ever appends: a prefix of the messages
encodes to a prefix of the tokens, so a prompt's tokens at sampling time are the tokens that training saw.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

import numpy as np

from jaxllm.core.types import UserError
from jaxllm.data.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
COLUMNS = ("messages", "prompt", "completion", "chosen", "rejected")
ALIASES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
# (prompt, completion) columns of well-known data sets, named in the hint when a row has neither of our shapes
RENAMES = (
    ("question", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("input", "output"),
)
# what a published template is told when it asks for the date: the same rows are to be the same tokens tomorrow
TODAY = datetime.datetime(2024, 7, 26)
PLAIN = {"system": "System: ", "user": "User: ", "assistant": "Assistant: "}

Messages = list[dict[str, str]]


class Example(NamedTuple):
    """tokens int32 [m]; mask bool [m]: True where the token is a trained target (the first never is)."""

    tokens: np.ndarray
    mask: np.ndarray


def normalise(row: Any, where: str) -> Messages:
    """The conversation of a row with `messages`, or with `prompt` and `completion` (each a str or messages).

    Other columns are ignored. UserError naming `where`: unknown roles, missing columns, other kinds of data.
    """
    have = columns(row, where)
    if "messages" in have:
        return check_messages(row["messages"], f"{where}, messages")
    if {"chosen", "rejected"} & set(have):
        raise UserError(
            f"{where} looks like preference data (columns: {', '.join(have)}): "
            "use python -m experiments.reward or experiments.dpo, or give it `messages`"
        )
    if "prompt" in have and "completion" in have:
        if isinstance(row.get("label"), bool):
            raise UserError(
                f"{where} looks like unpaired preference data (a bool `label` beside `completion`): "
                "use python -m experiments.kto, or keep the good rows and remove the column `label` to fine-tune on them"
            )
        prompt = as_messages(row["prompt"], "user", f"{where}, prompt")
        return prompt + as_messages(row["completion"], "assistant", f"{where}, completion")
    raise UserError(f"{where} {_missing(have)}")


def columns(row: Any, where: str) -> list[str]:
    """The columns of a row that hold a value. UserError when it is no mapping."""
    if not isinstance(row, Mapping):
        raise UserError(f"{where} is a {type(row).__name__}, not an object with columns")
    return [str(name) for name, value in row.items() if value is not None]


def _missing(have: list[str]) -> str:
    if have == ["text"]:
        return "has only `text`: use python -m experiments.pretrain for plain text, or give `messages`"
    for prompt, completion in RENAMES:
        if prompt in have and completion in have:
            return (
                f"has no `messages` and no `prompt` with `completion`: rename `{prompt}` to `prompt` and "
                f"`{completion}` to `completion`"
            )
    return f"needs `messages`, or `prompt` and `completion`; {describe(have)}"


def describe(have: list[str]) -> str:
    """The columns of a row that lacks one of ours, with the right name beside a misspelt one."""
    absent = [c for c in COLUMNS if c not in have]
    near = [(c, m[0]) for c in have if c not in COLUMNS and (m := get_close_matches(c, absent, 1, 0.7))]
    if near:
        return "it has " + ", ".join(f"`{c}` (did you mean `{name}`?)" for c, name in near)
    return f"its columns are {', '.join(have)}" if have else "it has no column with a value"


def as_messages(value: Any, role: str, where: str) -> Messages:
    """A str as one message of `role`; messages as they are, checked."""
    return [{"role": role, "content": value}] if isinstance(value, str) else check_messages(value, where)


def check_messages(messages: Any, where: str) -> Messages:
    """Messages with `role` and `content` only. UserError naming message, role and nearest role."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise UserError(f"{where} must be a list of {{role, content}}, not {type(messages).__name__}")
    if not messages:
        raise UserError(f"{where}: the conversation is empty")
    return [_check_message(m, f"{where}: message {i + 1}") for i, m in enumerate(messages)]


def _check_message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise UserError(f'{where} must be {{"role": ..., "content": ...}}, not {str(message)[:60]}')
    role, content = message["role"], message["content"]
    if role not in ROLES:
        word = str(role)[:60].lower()
        near = [ALIASES[word]] if word in ALIASES else get_close_matches(word, ROLES, 1, 0.5)
        hint = f'did you mean "{near[0]}"?' if near else f"use one of {', '.join(ROLES)}"
        raise UserError(f'{where} has the unknown role "{str(role)[:60]}": {hint}')
    if not isinstance(content, str):
        raise UserError(f"{where} has content of type {type(content).__name__}: only text is read")
    return {"role": role, "content": content}


def encode_chat(tokenizer: Tokenizer, messages: Messages, *, generation_prompt: bool = False) -> Example:
    """Tokens of a conversation; the mask is True on assistant content and on its end token only.

    With `generation_prompt` the opening of an assistant turn follows. A bos, where there is one, comes first. A tokenizer that
    came with a published template (Jinja) has its conversations written by that.
    """
    if (template := _published(tokenizer)) is not None:
        from jaxllm.data import template as jinja

        return jinja.encode(tokenizer, template, messages, generation_prompt=generation_prompt, now=TODAY)
    tokens = _bos(tokenizer)
    mask = [False] * len(tokens)
    for message in messages:
        head, tail = _opening(tokenizer, message["role"]), _closing(tokenizer, message["role"])
        body = [*tokenizer.encode(message["content"]), *tail]
        tokens += [*head, *body]
        mask += [False] * len(head) + [message["role"] == "assistant"] * len(body)
    if generation_prompt:
        head = _opening(tokenizer, "assistant")
        tokens += head
        mask += [False] * len(head)
    return Example(np.array(tokens, np.int32), np.array(mask, bool))


def _published(tokenizer: Tokenizer) -> str | None:
    """The published template that came with a tokenizer."""
    found = tokenizer.files.get("chat_template.jinja")
    return None if found is None else found.decode("utf-8")


def _bos(tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.specials["bos"]] if "bos" in tokenizer.specials else []


def _has_roles(tokenizer: Tokenizer) -> bool:
    return all(name in tokenizer.specials for name in (*ROLES, "end"))


def _opening(tokenizer: Tokenizer, role: str) -> list[int]:
    # the space belongs to the plain marker: what is sampled after it decodes to the content exactly
    return [tokenizer.specials[role]] if _has_roles(tokenizer) else list(tokenizer.encode(PLAIN[role]))


def _closing(tokenizer: Tokenizer, role: str) -> list[int]:
    if _has_roles(tokenizer):
        return [tokenizer.specials["end"]]
    return [tokenizer.specials["eos"]] if role == "assistant" else list(tokenizer.encode("\n"))


def encode_document(tokenizer: Tokenizer, text: str) -> Example:
    """A document of plain text and its eos, everything trained. A bos, where there is one, comes first."""
    tokens = np.array([*_bos(tokenizer), *tokenizer.encode(text), tokenizer.specials["eos"]], np.int32)
    return Example(tokens, np.ones(len(tokens), bool))


def text_ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """int32 [m]: a text that is to be continued, as documents begin; a bos, where there is one, comes first."""
    return np.array([*_bos(tokenizer), *tokenizer.encode(text)], np.int32)


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end an answer: the template's end token and eos."""
    specials = tokenizer.specials
    return tuple(dict.fromkeys(specials[name] for name in ("end", "eos") if name in specials))


def prompt_ids(tokenizer: Tokenizer, prompt: str | Messages) -> np.ndarray:
    """int32 [m]: a user's text, or a conversation, and the opening of the assistant's turn."""
    return encode_chat(tokenizer, as_messages(prompt, "user", "prompt"), generation_prompt=True).tokens


def spelled(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The text of ids with the special ones by their names: "<|user|>Hi<|end|>"."""
    names = {i: f"<|{name}|>" for name, i in tokenizer.specials.items()}
    runs = itertools.groupby(ids, lambda i: i in names)
    return "".join("".join(names[i] for i in run) if special else tokenizer.decode(list(run)) for special, run in runs)


def template_text(tokenizer: Tokenizer) -> str:
    """The published template, or ours in words, one line a role: what `template_hash` covers."""
    if (template := _published(tokenizer)) is not None:
        return template
    if _has_roles(tokenizer):
        turns = {role: (f"<|{role}|>", "<|end|>") for role in ROLES}
        kind = "control tokens"
    else:
        turns = {role: (PLAIN[role], "<eos>" if role == "assistant" else "\\n") for role in ROLES}
        kind = "plain text, encoded apart from the content"
    lines = ["begin: <bos>"] if _bos(tokenizer) else []
    lines += [f"{role}: {head}CONTENT{tail}" for role, (head, tail) in turns.items()]
    opening, closing = turns["assistant"]
    lines += [f"generation prompt: {opening}", f"trained: the assistant's CONTENT{closing}"]
    return "\n".join([f"markers: {kind}", *lines, ""])


def template_hash(tokenizer: Tokenizer) -> str:
    """sha256 of the template's description, in hexadecimal."""
    return hashlib.sha256(template_text(tokenizer).encode()).hexdigest()
