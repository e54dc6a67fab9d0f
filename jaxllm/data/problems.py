"""Problems with a known answer: GSM8K's rows, {prompt, answer}, {messages, answer}, as prompt, gold answer and solution."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from jaxllm.core.types import UserError
from jaxllm.data import chat
from jaxllm.data.chat import Messages
from jaxllm.data.text import checked_rows

ANNOTATION = re.compile(r"<<[^<>\n]*>>")
MARK = "####"
PROMPTS = ("prompt", "question", "problem")
ANSWERS = ("gold", "answer")


class Problem(NamedTuple):
    """prompt: messages that a completion answers; gold: the answer alone; solution: the worked text with it, "" when not given;
    row: all columns of the row, for reward functions that need more; where: it stands."""

    prompt: Messages
    gold: str
    solution: str
    row: dict[str, Any]
    where: str


def read_problems(path: Any) -> list[Problem]:
    """The problems of a file (see text.read_rows); UserErrors name the file and the row."""
    return checked_rows(path, problem)[0]


def problem(row: Any, where: str) -> Problem:
    """A row with `prompt`, `question`, `problem` (text or messages) or `messages`, and `answer` (or `gold`).

    An answer with `#### n` (GSM8K) is a solution whose gold is n; its calculator annotations are taken out. A last assistant
    message is no part of the prompt: it is the solution. A row with `tests` needs no answer (and may have a `solution`, text):
    see rewards.code. UserErrors name the experiment that the row belongs to.
    """
    have = chat.columns(row, where)
    if {"chosen", "rejected"} & set(have):
        raise UserError(
            f"{where} looks like preference data (columns: {', '.join(have)}): "
            "use python -m experiments.dpo or experiments.reward"
        )
    name = next((c for c in (*PROMPTS, "messages") if c in have), None)
    answer = next((c for c in ANSWERS if c in have), None)
    if name is not None and answer is None and "tests" in have:  # a program is checked by running it
        return Problem(chat.as_messages(row[name], "user", f"{where}, {name}"), "", _solution(row, where), dict(row), where)
    if name is None or answer is None:
        raise UserError(f"{where} {_missing(have, name)}")
    text = row[answer]
    if isinstance(text, bool) or not isinstance(text, (str, int, float)):
        raise UserError(f"{where}: `{answer}` is a {type(text).__name__}: give the answer as text or a number")
    gold, solution = split_solution(str(text))
    if not gold:
        raise UserError(f"{where}: `{answer}` is empty{f' after {MARK}' if MARK in str(text) else ''}: give what is right")
    prompt = chat.as_messages(row[name], "user", f"{where}, {name}")
    if len(prompt) > 1 and prompt[-1]["role"] == "assistant":
        prompt, solution = prompt[:-1], solution or prompt[-1]["content"]
    return Problem(prompt, gold, solution, dict(row), where)


def _solution(row: Any, where: str) -> str:
    found = row.get("solution") or ""
    if not isinstance(found, str):
        raise UserError(f"{where}: `solution` is a {type(found).__name__}: give the program as text")
    return found


def split_solution(text: str) -> tuple[str, str]:
    """("72", the whole text without annotations) of GSM8K's answers; (text, "") of an answer without `####`."""
    if MARK not in text:
        return text.strip(), ""
    return text.rsplit(MARK, 1)[1].strip(), without_annotations(text).strip()


def without_annotations(text: str) -> str:
    """The text without GSM8K's calculator annotations: "48/2 = <<48/2=24>>24" becomes "48/2 = 24"."""
    return ANNOTATION.sub("", text)


def _missing(have: list[str], prompt: str | None) -> str:
    """What a row without a prompt or an answer looks like, and where it belongs."""
    if "completion" in have and "label" in have:
        return "looks like unpaired preference data (completion, label): use python -m experiments.kto"
    if "messages" in have or {"prompt", "completion"} <= set(have):
        shown = "messages" if "messages" in have else "prompt, completion"
        return f"looks like SFT data (columns: {shown}): use python -m experiments.sft, or add the `answer` to check"
    if have == ["text"]:
        return "has only `text`: use python -m experiments.pretrain for plain text"
    if prompt is not None:
        return f"has `{prompt}` but no `answer` to check a completion with; {chat.describe(have)}"
    return f"needs `question` (or `prompt`) and `answer`; {chat.describe(have)}"
