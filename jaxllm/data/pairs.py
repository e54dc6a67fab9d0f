"""Preference rows in all of their shapes: to a prompt and two completions, and to two aligned records."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxllm.core.types import UserError
from jaxllm.data import chat, pack
from jaxllm.data.chat import Example, Messages
from jaxllm.data.tokenizer import Tokenizer

Pair = dict[str, Messages]
SIDES = ("chosen", "rejected")
TURN = re.compile(r"\n\n(Human|Assistant):")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def normalise_pair(row: Any, where: str) -> Pair:
    """{"prompt", "chosen", "rejected"} as messages; a row that has this form already passes unchanged.

    With `prompt` (str or messages), the sides are completions (str or messages), or whole conversations that
    begin with the prompt. Without it they are plain strings or whole conversations that share their beginning
    (messages, or "\\n\\nHuman: ...\\n\\nAssistant: ..."). Other columns are ignored. UserErrors name the row.
    """
    have = chat.columns(row, where)
    if not {"chosen", "rejected"} <= set(have):
        raise UserError(f"{where} {_missing(have)}")
    sides = [row["chosen"], row["rejected"]]
    if "prompt" in have:
        return _explicit(row["prompt"], sides, where)
    if all(isinstance(side, str) for side in sides):
        dialogues = [_dialogue(side) for side in sides]
        if all(dialogues):
            return _shared_messages(dialogues, where)
        return _shared_text(*sides)
    if any(isinstance(side, str) for side in sides):
        raise UserError(f"{where}: without `prompt`, `chosen` and `rejected` must both be text, or messages")
    return _shared_messages([chat.check_messages(row[s], f"{where}, {s}") for s in SIDES], where)


def encode_pairs(tokenizer: Tokenizer, rows: Iterable[Any], length: int) -> tuple[dict[str, pack.Record], pack.Report]:
    """({"chosen": sequence record, "rejected": sequence record}, report) of raw or normalised rows.

    Row i of both sides is the same pair. The mask is True on the completion's assistant content and end
    tokens only. A pair of which a side keeps no such token within `length` is left out of both sides.
    Counted: those (dropped, untrained), kept pairs with a cut side (truncated), equal sides (identical).
    """
    pairs = [_encode(tokenizer, normalise_pair(row, f"pair {i + 1}")) for i, row in enumerate(rows)]
    lost = [i for i, pair in enumerate(pairs) if not all(pack.trained(side, length) for side in pair)]
    gone = set(lost)
    kept = [pair for i, pair in enumerate(pairs) if i not in gone]
    (chosen, a), (rejected, b) = (pack.pad([pair[side] for pair in kept], length) for side in range(2))
    lengths = np.array([len(side.tokens) for pair in pairs for side in pair])
    report = {
        "rows": a["rows"],
        "examples": len(pairs),
        "tokens": a["tokens"] + b["tokens"],
        "trained_tokens": a["trained_tokens"] + b["trained_tokens"],
        "fill": (a["fill"] + b["fill"]) / 2,
        "truncated": sum(any(len(side.tokens) > length + 1 for side in pair) for pair in kept),
        "dropped": len(lost),
        **pack.nothing_trained(lost, lost_side(pairs[lost[0]], length) if lost else None, length),
        "identical": sum(np.array_equal(x.tokens, y.tokens) for x, y in pairs),
        "lengths": pack.histogram(lengths),
    }
    return {"chosen": chosen, "rejected": rejected}, report


def lost_side(sides: Sequence[Example], length: int) -> Example:
    """The first side that keeps no trained token."""
    return next(side for side in sides if not pack.trained(side, length))


def _encode(tokenizer: Tokenizer, pair: Pair) -> tuple[Example, Example]:
    """Both sides, each with the prompt, of which nothing is trained, not even the assistant's turns."""
    prompt = len(chat.encode_chat(tokenizer, pair["prompt"]).tokens)
    chosen, rejected = (chat.encode_chat(tokenizer, pair["prompt"] + pair[side]) for side in SIDES)
    chosen.mask[:prompt] = rejected.mask[:prompt] = False  # the template only appends
    return chosen, rejected


def read_prompt(prompt: Any, where: str) -> Messages:
    """A row's prompt (str, dialogue in one string, or messages; [] is the prompt of a row without one) as messages."""
    if prompt == []:
        return []
    before = _read(prompt, "user", f"{where}, prompt")
    # the "Assistant:" at the end of a dialogue opens the answer
    return before[:-1] if isinstance(prompt, str) and before[-1] == {"role": "assistant", "content": ""} else before


def read_completion(prompt: Messages, value: Any, where: str) -> Messages:
    """A completion (str, or messages that may repeat the prompt) as the messages that answer the prompt."""
    return _continuation(prompt, _read(value, "assistant", where), where)


def _explicit(prompt: Any, sides: list[Any], where: str) -> Pair:
    before = read_prompt(prompt, where)
    chosen, rejected = (read_completion(before, x, f"{where}, {side}") for side, x in zip(SIDES, sides, strict=True))
    return {"prompt": before, "chosen": chosen, "rejected": rejected}


def _read(value: Any, role: str, where: str) -> Messages:
    """Messages, the turns of a dialogue in one string, or a string as one message of `role`."""
    return (isinstance(value, str) and _dialogue(value)) or chat.as_messages(value, role, where)


def _continuation(prompt: Messages, side: Messages, where: str) -> Messages:
    """The part of a side that follows the prompt: some data sets repeat the prompt in it."""
    if prompt and side[0]["role"] != "assistant" and side[: len(prompt)] == prompt:
        side = side[len(prompt) :]
    if not side or side[0]["role"] != "assistant":
        role = f"begins with the role {side[0]['role']}" if side else "ends with the prompt"
        raise UserError(f"{where} {role}: it must answer the prompt with an assistant message")
    return side


def _dialogue(text: str) -> Messages | None:
    """The turns of "\\n\\nHuman: ...\\n\\nAssistant: ...", or None when the text is not such a dialogue."""
    before, *parts = TURN.split("\n\n" + text.strip())
    if before or "Assistant" not in parts[0::2] or parts[0] != "Human":
        return None
    turns = zip(parts[0::2], parts[1::2], strict=True)
    return [{"role": SPEAKERS[who], "content": said.strip()} for who, said in turns]


def _shared_messages(sides: list[Messages], where: str) -> Pair:
    """Split after the shared messages, where both sides go on with an assistant's turn."""
    chosen, rejected = sides
    most = min(len(chosen), len(rejected)) - 1  # a completion is never empty, even if the sides are identical
    shared = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    while shared >= 0 and not chosen[shared]["role"] == rejected[shared]["role"] == "assistant":
        shared -= 1
    if shared < 0:
        raise UserError(
            f"{where}: `chosen` and `rejected` share no prompt that an assistant answers (they begin with "
            f"{chosen[0]['content'][:40]!r} and {rejected[0]['content'][:40]!r})"
        )
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _shared_text(chosen: str, rejected: str) -> Pair:
    """Split plain strings at the last word boundary they share: "The sky is" with " blue." and " green."."""
    most = min(len(chosen), len(rejected))
    same = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    cut = 0 if chosen == rejected else max(chosen.rfind(" ", 0, same), chosen.rfind("\n", 0, same), 0)
    prompt = [{"role": "user", "content": chosen[:cut]}] if cut else []
    return {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": chosen[cut:]}],
        "rejected": [{"role": "assistant", "content": rejected[cut:]}],
    }


_PAIRS = ", but preferences need `chosen` and `rejected` (docs/data.md)"


def _missing(have: list[str]) -> str:
    """What a row without both sides looks like, and where it belongs."""
    if "messages" in have:
        return f"looks like SFT data (columns: messages){_PAIRS}: use python -m experiments.sft for it"
    if "completion" in have and "label" in have:
        return (
            "looks like unpaired preference data (completion, label): use python -m experiments.kto for it, "
            "or give `chosen` and `rejected`"
        )
    if "prompt" in have and "completion" in have:
        return f"looks like SFT data (columns: prompt, completion){_PAIRS}: use python -m experiments.sft for it"
    if have == ["text"]:
        return "has only `text`: use python -m experiments.pretrain for plain text"
    absent = " and ".join(f"`{c}`" for c in SIDES if c not in have)
    return f"has no {absent}; {chat.describe(have)}"
