"""Passwords and access tokens, kept out of everything a run writes or prints: `clean` stands before every file and every line.

Three ways to know one: its name (`--config.hub.api_key=...`), its shape (hf_..., sk-..., AKIA..., user-info of an address), and
its value, once it was seen under such a name in a config, on the command line, or in the environment.
"""

from __future__ import annotations

import functools
import html
import itertools
import json
import os
import re
import shlex
import urllib.parse
from collections.abc import Iterable, Mapping
from typing import Any

HIDDEN = "***"
PLAIN = {"auto"}  # values that ask for a secret to be made
SHORTEST = 6  # characters of a value that is hidden wherever it stands; shorter ones only beside their name

SURE = r"secret|passw(?:or)?d|passphrase|api[_-]?key|access[_-]?key|private[_-]?key|credential"
ACCESS = r"(?:access|auth|api|hf|hub|bearer|refresh|session|id|github|wandb)[_-]?tokens?"
NAME = re.compile(rf"(?i){SURE}|{ACCESS}(?![a-z])|(?<![a-z])token$")
# the tokens of texts
TEXT = re.compile(
    r"(?i)(?:^|[._-])(?:bos|eos|pad|cls|sep|unk|mask|end|start|stop|special|image|user|assistant|system|new|next|last|first|per|"
    r"max|min|num)[_-]?token$"
)
SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{12,}|\bsk-[A-Za-z0-9_-]{12,}|\bgh[pousr]_[A-Za-z0-9]{12,}|\bgithub_pat_[A-Za-z0-9_]{12,}"
    r"|\bglpat-[A-Za-z0-9_-]{12,}|\b(?:AKIA|ASIA)[A-Z0-9]{12,}|\bAIza[A-Za-z0-9_-]{30,}|\bxox[abprs]-[A-Za-z0-9-]{8,}"
    r"|\beyJ[A-Za-z0-9_-]{8,500}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*|(?i:\bbearer )[A-Za-z0-9._~+/-]{12,}|(?<=://)[^/\s@]+(?=@)"
)
# name=value, 'name': 'value', and name: value where the name leaves no doubt
VALUE = r"""(?:"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|[^\s,;'"()\[\]{}]+)"""
GIVEN = re.compile(rf"""(?<![\w.-])(?P<name>[\w.-]{{1,100}})(?P<mid>["']?\s?=\s?|["']\s?:\s?|\s?:\s)(?P<value>{VALUE})""")

_known: set[str] = set()


def secret_name(name: str) -> bool:
    """Whether a setting, a flag or a variable of this name holds a secret; num_tokens, eos_token, tokenizer do not."""
    return NAME.search(name) is not None and TEXT.search(name) is None


def clean(text: str) -> str:
    """The text without secrets by shape and by value: for whatever is written."""
    text = SHAPES.sub(HIDDEN, text)
    known = _pattern(frozenset(_known | _environment()))
    return text if known is None else known.sub(HIDDEN, text)


def clean_message(text: str) -> str:
    """The same, and without values beside their names: for lines of a log, commands and tracebacks."""
    return clean(GIVEN.sub(_without_value, text))


def redact(tree: Any, name: str = "") -> Any:
    """The tree without secrets: what stands under a secret name, however deep, and in any text."""
    if isinstance(tree, Mapping):
        return {key: redact(value, name if secret_name(name) else str(key)) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [redact(value, name) for value in tree]
    if secret_name(name) and tree and not isinstance(tree, bool):
        return HIDDEN
    return clean(tree) if isinstance(tree, str) else tree


def remember(tree: Any = None, arguments: Iterable[str] = ()) -> None:
    """Secrets of a config and of a command line, to be hidden from now on wherever they stand."""
    _known.update(_values(tree, False))
    words = [*arguments, ""]
    for word, following in itertools.pairwise(words):
        flag, given, value = word.partition("=")
        if secret_name(flag):
            value = value if given else "" if following.startswith("-") else following
            _known.update(v for v in (value, value.strip("'\"")) if len(v) >= SHORTEST)


def _values(tree: Any, secret: bool) -> Iterable[str]:
    """Texts and numbers under secret names."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _values(value, secret or secret_name(str(key)))
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _values(value, secret)
    elif secret and not isinstance(tree, bool) and tree is not None and len(str(tree)) >= SHORTEST:
        yield str(tree)


def _environment() -> set[str]:
    return {value for name, value in os.environ.items() if secret_name(name) and len(value) >= SHORTEST}


@functools.lru_cache(4)
def _pattern(values: frozenset[str]) -> re.Pattern | None:
    """A pattern for all values as they are written in Python, JSON, HTML, addresses and shells, the longest first."""
    forms = {form for value in values if value != HIDDEN for form in _forms(value)}
    return re.compile("|".join(map(re.escape, sorted(forms, key=len, reverse=True)))) if forms else None


def _forms(value: str) -> set[str]:
    written = (json.dumps(value), json.dumps(value, ensure_ascii=False), repr(value))
    quoted = (shlex.quote(value), html.escape(value), urllib.parse.quote(value), urllib.parse.quote_plus(value))
    return {value, *(text[1:-1] for text in written), *quoted}


def _without_value(match: re.Match) -> str:
    name, mid, value = match["name"], match["mid"], match["value"]
    if not secret_name(name) or value.strip("'\"") in PLAIN:
        return match[0]
    if "=" not in mid and mid[0] not in "\"'" and not re.search(f"(?i){SURE}", name):
        return match[0]
    quote = value[0] if value[0] in "\"'" else ""
    return f"{name}{mid}{quote}{HIDDEN}{quote}"
