"""Published chat templates (Jinja): rendered in a sandboxed process, encoded so that text never becomes a special token.

What a message spells like a special token is taken out before rendering and put back as plain text after it, under marks that
nobody can guess; the template sees the rest of the text as it is, and may trim or split it as its author meant.
"""

from __future__ import annotations

import atexit
import dataclasses
import datetime
import functools
import json
import os
import re
import secrets
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxllm.core.types import UserError
from jaxllm.data.chat import Example
from jaxllm.data.tokenizer import Tokenizer, is_special

FILE = "chat_template.jinja"
OWN = "{#- jaxllm -#}"  # how an exported template of `chat`'s control tokens begins: these need no Jinja here
SECONDS = 5.0  # for one conversation
CHARACTERS = 4_000_000  # of one conversation
REPLY = 12 * CHARACTERS + 2**16  # bytes: JSON spells a character with up to 12
ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "LANG")  # what the process gets of ours: no tokens
OPEN, CLOSE = "\ue000", "\ue001"  # private use: marks are digits between these two

_lock = threading.Lock()
_workers: list[subprocess.Popen] = []


def load(directory: str | Path) -> str | None:
    """The template of a published directory: chat_template.jinja, else what tokenizer_config.json holds; None without one.

    UserError when the one is not UTF-8, or the other no JSON.
    """
    directory = Path(directory)
    file = directory / FILE
    config = directory / "tokenizer_config.json"
    try:
        if file.is_file():
            return file.read_text(encoding="utf-8")
        if not config.is_file():
            return None
        found = json.loads(config.read_bytes()).get("chat_template")
    except UnicodeDecodeError as error:
        where = file if file.is_file() else config
        raise UserError(f"{where}: not UTF-8 at byte {error.start}: save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError, AttributeError) as error:
        raise UserError(f"{config}: not a JSON object ({error})") from None
    if isinstance(found, list):  # several by name
        found = {str(t.get("name")): t.get("template") for t in found if isinstance(t, dict)}.get("default")
    if not isinstance(found, str):
        return None
    if (lone := re.search("[\ud800-\udfff]", found)) is not None:
        raise UserError(f"{config}: chat_template has a lone surrogate at character {lone.start()}: it is no text")
    return found


def attach(tokenizer: Tokenizer, directory: str | Path) -> Tokenizer:
    """The tokenizer with the directory's template among its files, where `chat.encode_chat` finds it."""
    found = load(directory)
    if found is None or found.startswith(OWN):
        return tokenizer
    return dataclasses.replace(tokenizer, files={**tokenizer.files, FILE: found.encode()})


def render(
    template: str, messages: Sequence[Mapping[str, Any]], *, generation_prompt: bool = False,
    variables: Mapping[str, Any] | None = None, now: datetime.datetime | None = None,
) -> str:  # fmt: skip
    """The conversation as the template writes it; `now` is what strftime_now tells.

    UserError with the template's own message, or when it takes over 5 seconds, 4 million characters or 1 GB.
    """
    return _render(template, messages, generation_prompt, variables or {}, now, "", "")


def encode(
    tokenizer: Tokenizer, template: str, messages: Sequence[Mapping[str, Any]], *, generation_prompt: bool = False,
    variables: Mapping[str, Any] | None = None, now: datetime.datetime | None = None,
) -> Example:  # fmt: skip
    """tokens of a rendered conversation; mask True on what the assistant writes.

    The template's special tokens are recognised, those that messages spell are plain text. Trained is what stands in
    {% generation %} blocks; in a template without them, what each assistant turn adds behind its generation prompt, to its
    last special token; with generation_prompt, nothing. UserError as `render`, and when a turn rewrites the text before it.
    """
    spellings = special_spellings(tokenizer)
    names = {f"{name}_token": tokenizer.piece(i) for name, i in tokenizer.specials.items() if name in ("bos", "eos", "pad")}
    given = names | dict(variables or {})
    nonce = str(secrets.randbits(96))
    marks: dict[str, str] = {}
    hidden = [_hide(dict(m), _spellings(tuple(spellings)), nonce, marks) for m in messages]
    begin, end = (f"{OPEN}{nonce}0{digit}{CLOSE}" for digit in "12")
    when = now or datetime.datetime.now()
    text = _render(template, hidden, generation_prompt, given, when, begin, end)
    if generation_prompt:
        spans = [(text.replace(begin, "").replace(end, ""), False)]
    elif begin in text:
        spans = _marked(text, begin, end)
    else:
        spans = _by_turns(template, hidden, text, given, when, spellings)
    return _tokens(tokenizer, spans, spellings, marks, nonce)


def special_spellings(tokenizer: Tokenizer) -> dict[str, int]:
    """Every special token as text -> its id."""
    found, ours = {tokenizer.piece(i): i for i in tokenizer.specials.values()}, set(tokenizer.specials.values())
    if "tokenizer.json" in tokenizer.files:
        found |= {t["content"]: t["id"] for t in _added_tokens(tokenizer.files["tokenizer.json"]) if is_special(t, ours)}
    elif "tokenizer.model" in tokenizer.files:
        found |= _control_pieces(tokenizer.files["tokenizer.model"])
    return {text: i for text, i in found.items() if text}


@functools.lru_cache(8)
def _added_tokens(content: bytes) -> list[dict[str, Any]]:
    """The added tokens of a tokenizer.json, which may have megabytes."""
    return json.loads(content).get("added_tokens") or []


@functools.lru_cache(8)
def _control_pieces(model: bytes) -> dict[str, int]:
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    return {sp.id_to_piece(i): i for i in range(sp.get_piece_size()) if sp.is_control(i)}


# ---- what messages spell


class _Spellings(NamedTuple):
    """whole: matches any special; starts and ends: every proper beginning and end of one; longest: in characters."""

    whole: re.Pattern
    starts: frozenset[str]
    ends: frozenset[str]
    longest: int


@functools.lru_cache(8)
def _spellings(texts: tuple[str, ...]) -> _Spellings:
    starts = frozenset(t[:i] for t in texts for i in range(1, len(t)))
    ends = frozenset(t[i:] for t in texts for i in range(1, len(t)))
    return _Spellings(_any_of((*texts, OPEN, CLOSE)), starts, ends, max(map(len, texts), default=0))


def _any_of(texts: Iterable[str]) -> re.Pattern:
    """A pattern for each of the texts, the longest first."""
    return re.compile("(" + ("|".join(re.escape(t) for t in sorted(texts, key=len, reverse=True)) or "(?!)") + ")")


def _hide(value: Any, spelled: _Spellings, nonce: str, marks: dict[str, str]) -> Any:
    """Every special spelling in the strings of a message, but a role that is a word, as a mark; marks: mark -> text."""
    if isinstance(value, Mapping):
        hide = lambda x: _hide(x, spelled, nonce, marks)  # noqa: E731
        named = {k if _is_name(k) else hide(k): v for k, v in value.items()}  # the arguments of a tool are a model's words
        return {k: v if k == "role" and _is_name(v) else hide(v) for k, v in named.items()}
    if isinstance(value, list | tuple):
        return [_hide(v, spelled, nonce, marks) for v in value]
    if not isinstance(value, str):
        return value

    def mark(text: str) -> str:
        key = f"{OPEN}{nonce}9{len(marks)}{CLOSE}"
        marks[key] = text
        return key

    value = spelled.whole.sub(lambda m: mark(m[0]), value)
    # half a spelling at an edge could be completed by what the template puts beside it, white space trimmed or not
    body = value.strip()
    at = value.find(body)
    before, after = value[:at], value[at + len(body) :]
    lengths = range(min(spelled.longest, len(body)), 0, -1)
    if n := next((n for n in lengths if body[-n:] in spelled.starts), 0):
        body = body[:-n] + mark(body[-n:])
    if n := next((n for n in lengths if body[:n] in spelled.ends), 0):
        body = mark(body[:n]) + body[n:]
    return before + body + after


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isidentifier()


# ---- what is trained


def _marked(text: str, begin: str, end: str) -> list[tuple[str, bool]]:
    """(text, trained) by the marks around generation blocks."""
    parts = re.split(f"({begin}|{end})", text)
    return [(part, i > 0 and parts[i - 1] == begin) for i, part in enumerate(parts) if i % 2 == 0]


def _by_turns(
    template: str, messages: list, text: str, given: Mapping, when: datetime.datetime, spellings: Mapping[str, int]
) -> list[tuple[str, bool]]:
    """(text, trained) by rendering every beginning of the conversation that ends at an assistant's turn."""
    spans, at = [], 0
    for i, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before = _render(template, messages[:i], True, given, when, "", "")
        after = _render(template, messages[: i + 1], False, given, when, "", "")
        if not text.startswith(after) or not after.startswith(before) or len(before) < at:
            raise UserError(
                f"chat template: message {i + 1} changes the text before it: mark what is trained with {{% generation %}}"
            )
        last = max((after.rfind(s) + len(s) for s in spellings if s in after[len(before) :]), default=len(after))
        spans += [(text[at : len(before)], False), (text[len(before) : last], True)]
        at = last
    return [*spans, (text[at:], False)]


def _tokens(
    tokenizer: Tokenizer, spans: list[tuple[str, bool]], spellings: Mapping[str, int], marks: Mapping[str, str], nonce: str
) -> Example:
    """Ids of the template's specials by id, of all else as plain text."""
    ids: list[int] = []
    mask: list[bool] = []
    specials, mark = _any_of(spellings), re.compile(f"({OPEN}{nonce}9\\d+{CLOSE})")
    for text, trained in spans:
        for i, part in enumerate(specials.split(text)):
            pieces = mark.split(part)
            if any(OPEN in piece or CLOSE in piece for piece in pieces[::2]):
                raise UserError("chat template: it cuts into a message's text where that spells a special token")
            plain = "".join(marks[piece] if j % 2 else piece for j, piece in enumerate(pieces))
            new = [spellings[part]] if i % 2 else tokenizer.encode(plain) if plain else []
            ids += new
            mask += [trained] * len(new)
    return Example(np.array(ids, np.int32), np.array(mask, bool))


# ---- the process


def _render(
    template: str, messages: Sequence, prompt: bool, variables: Mapping, now: datetime.datetime | None, begin: str, end: str
) -> str:
    request = {
        "template": template, "open": begin, "close": end, "limit": CHARACTERS,
        "now": (now or datetime.datetime.now()).isoformat(),
        "variables": {**variables, "messages": list(messages), "add_generation_prompt": prompt},
    }  # fmt: skip
    try:
        line = json.dumps(request, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"chat template: messages and variables must be JSON values ({error})") from None
    with _lock:
        reply = _ask(line)
    if "error" in reply:
        raise UserError(f"chat template: {' '.join(reply['error'].split())[:500]}")
    return reply["text"]


def _ask(line: str) -> dict[str, str]:
    """One line to the worker and its answer. A worker that is late or gone is replaced next time."""
    if not _workers:
        _workers.append(_start())
    worker = _workers[0]
    writer = threading.Thread(target=_write, args=(worker, line), daemon=True)  # a pipe holds 64 kB: read while writing
    writer.start()
    data = bytearray()
    deadline = time.monotonic() + SECONDS
    while not data.endswith(b"\n"):
        left = deadline - time.monotonic()
        ready = left > 0 and select.select([worker.stdout], [], [], left)[0]
        block = worker.stdout.read1(1 << 16) if ready else b""
        if not block:
            _stop()
            return {"error": f"did not finish within {SECONDS:g} seconds" if not ready else "its process ended (out of memory?)"}
        data += block
        if len(data) > REPLY:
            _stop()
            return {"error": "its process wrote without end"}
    return json.loads(data)


def _write(worker: subprocess.Popen, line: str) -> None:
    try:
        worker.stdin.write(line.encode() + b"\n")
        worker.stdin.flush()
    except (OSError, ValueError):  # it was ended meanwhile
        return


def _start() -> subprocess.Popen:
    program = Path(__file__).with_name("template_worker.py")
    kept = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    return subprocess.Popen([sys.executable, "-P", str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=kept)


def _stop() -> None:
    while _workers:
        worker = _workers.pop()
        worker.kill()
        worker.wait()


atexit.register(_stop)
