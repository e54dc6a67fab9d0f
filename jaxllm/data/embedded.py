"""Real text on any machine: English prose and code of the running Python's standard library.

Prose is docstrings, comments and the help topics; code is the sources without these: the two share
nothing.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from jaxllm.core.types import UserError

TESTS = {"test", "tests", "idle_test"}
OTHERS = {"site-packages", "dist-packages", "__pycache__", "_bundled"}
TABLES = {"encodings", "pydoc_data"}  # code pages; and the help topics, which are read as prose
SKIP = TESTS | OTHERS | TABLES
COMMENT = re.compile(r"(?:^[ \t]*#[^\n]*\n)+", re.MULTILINE)
HASHES = re.compile(r"^[ \t]*#+ ?", re.MULTILINE)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
WORD = re.compile(r"\b[A-Za-z]{2,}\b")
LEAST = 200_000  # characters: a stripped installation has less


def embedded() -> list[str]:
    """Prose and code of the standard library as one list of documents, in a fixed order that mixes them."""
    return _in_order([*embedded_prose(), *embedded_code()])


def embedded_prose() -> list[str]:
    """English: docstrings, blocks of comments and help topics, no two the same."""
    return list(_texts()[0])


def embedded_code() -> list[str]:
    """Source files without docstrings and comment blocks, no two the same."""
    return list(_texts()[1])


@functools.cache
def _texts() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(prose, code). UserError when the sources are not there."""
    root = Path(sysconfig.get_path("stdlib"))
    prose, code = list(_topics(root)), []
    for path in sorted(root.rglob("*.py")):
        if SKIP.isdisjoint(path.relative_to(root).parts):
            words, source = _split(path)
            prose += words
            code += [source] if source else []
    prose, code = [_in_order(p for p in prose if _is_english(p)), _in_order(code)]
    if sum(map(len, prose)) < LEAST or sum(map(len, code)) < LEAST:
        raise UserError(f"{root} holds no sources (a stripped Python): give text as --config.data.path")
    return tuple(prose), tuple(code)


def _split(path: Path) -> tuple[list[str], str]:
    """A source file's prose, and its code with the prose taken out; nothing of a file that does not parse."""
    try:
        source = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        tree = ast.parse(source)
    except (SyntaxError, ValueError, OSError, RecursionError):
        return [], ""
    lines = source.split("\n")
    prose = []
    for node in _blocks(tree):
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            prose.append(text.strip())
            first = node.body[0]
            left = "" if len(node.body) > 1 else " " * first.col_offset + "pass"
            lines[first.lineno - 1 : first.end_lineno] = [left, *[""] * (first.end_lineno - first.lineno)]
    rest = "\n".join(lines)
    prose += [HASHES.sub("", block).strip() for block in COMMENT.findall(rest)]
    return prose, re.sub(r"\n{3,}", "\n\n", COMMENT.sub("", rest)).strip()


def _blocks(node: ast.AST) -> Iterable[ast.AST]:
    """The node and the statements with a body inside it; ast.walk would visit every expression."""
    yield node
    for field in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(node, field, ()):
            if hasattr(child, "body"):
                yield from _blocks(child)


def _topics(root: Path) -> Iterable[str]:
    """The texts of `help()`, read and not imported."""
    path = root / "pydoc_data" / "topics.py"
    if not path.is_file():
        return
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Dict):
            for value in node.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value.strip()


def _is_english(text: str) -> bool:
    """Eight words or more, which make up most of the text: no tables, rulers or commented code."""
    words = WORD.findall(text)
    return len(words) >= 8 and sum(map(len, words)) > 0.6 * len(text.replace(" ", ""))


def _in_order(documents: Iterable[str]) -> list[str]:
    """Distinct documents (but for white space) in the order of their hashes: any first part is a fair sample.

    The hash is salted: the held-out split hashes documents too, and must not favour the first ones.
    """
    found = {hashlib.sha256(b"order " + " ".join(d.split()).encode("utf-8", "replace")).digest(): d for d in documents}
    return [found[key] for key in sorted(found)]
