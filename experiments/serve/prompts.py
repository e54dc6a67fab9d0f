"""Conversations and texts of requests as tokens; what a client writes never becomes a special token."""

from __future__ import annotations

from typing import Any

from experiments import chat as chatting
from experiments.serve.fields import Refused
from jaxllm.core.types import UserError
from jaxllm.data import chat


def messages(body: dict[str, Any], loaded: Any) -> tuple[int, ...]:
    """The tokens of a conversation and of the opening of an answer."""
    given = body.get("messages")
    given = [_plain(m) for m in given] if isinstance(given, list) else given
    try:
        return _ids(chatting.prompt_of(loaded, chat.check_messages(given, "messages")), "messages")
    except UserError as error:
        raise Refused(400, str(error), param="messages") from None


def _plain(message: Any) -> Any:
    """A message whose content in parts, all of them text, is one text; `developer` is what `system` is called now."""
    if not isinstance(message, dict):
        return message
    content, role = message.get("content"), message.get("role")
    if isinstance(content, list):
        if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content):
            raise Refused(400, "only text is read: every part of content must have the type text", param="messages")
        content = "".join(part["text"] for part in content)
    return {"role": "system" if role == "developer" else role, "content": content}


def given(body: dict[str, Any]) -> list[Any]:
    """The prompts of a request, each still as the client gave it."""
    prompt = body.get("prompt")
    return prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]


def prompts(rows: list[Any], loaded: Any) -> list[tuple[int, ...]]:
    """Tokens of texts and of token ids."""
    found, size = [], loaded.model.config.vocab_size
    for row in rows:
        if isinstance(row, str):
            found.append(_text(row, loaded))
        elif isinstance(row, list) and row and all(type(i) is int and 0 <= i < size for i in row):
            found.append(tuple(row))
        else:
            raise Refused(400, f"prompt must be text or token ids from 0 to {size - 1}, one or a list of them", param="prompt")
    return found


def _text(text: str, loaded: Any) -> tuple[int, ...]:
    try:
        return _ids(chat.text_ids(loaded.tokenizer, text), "prompt")
    except UserError as error:
        raise Refused(400, str(error), param="prompt") from None


def _ids(ids: Any, param: str) -> tuple[int, ...]:
    if not len(ids):
        raise Refused(400, f"{param}: there is no text to continue", param=param)
    return tuple(int(i) for i in ids)
