"""Documents and rows from files and `datasets`: every defect is one line that names the file and the line."""

from __future__ import annotations

import difflib
import gzip
import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jaxllm.core.types import UserError
from jaxllm.data import hub
from jaxllm.data.embedded import embedded, embedded_code, embedded_prose

__all__ = [
    "checked_rows", "checked_text", "embedded", "embedded_code", "embedded_prose", "first_row", "named", "placed", "placed_rows",
    "read_rows", "read_text", "split_by_hash",
]  # fmt: skip

MAX_LINE = 2**25  # bytes of one JSON line: a longer one is no example but a damaged file
MAX_WHOLE = 2**30  # bytes, unpacked, of a file that is read whole
MOST_SKIPPED = 0.01  # of the rows, that on_error="skip" may leave out
MOST_NAMED = 1000  # bad rows that are looked for before a file is given up
BOM = b"\xef\xbb\xbf"
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

Item = tuple[str, Callable[[], Any]]  # where it stands, and what gives the row or the text, or raises UserError


def read_text(path: str | Path, *, column: str = "text", split: str = "train") -> list[str]:
    """The documents of `checked_text`, strictly."""
    return checked_text(path, column=column, split=split)[0]


def checked_text(
    path: str | Path, *, column: str = "text", split: str = "train", on_error: str = "stop"
) -> tuple[list[str], list[str]]:
    """(documents, errors of rows left out) of a .txt or .md file (one document), of rows' `column` (.jsonl, .json, each also
    .gz; .parquet), of a directory of such files, of a `datasets.save_to_disk` directory, or of `hf:name[:config]`.

    Documents without a visible character are passed over. on_error: see `checked_rows`. UserError: missing, empty,
    malformed or not UTF-8 (file and line), or a row without the column.
    """

    def document(item: Any, where: str) -> str:
        return item if isinstance(item, str) else _column(item, column, where)

    found, bad = _checked(_items(path, split, texts=True), document, on_error)
    documents = [document for document in found if document.strip()]
    if not documents:
        raise UserError(f"{path}: empty: every document in it is blank")
    return documents, bad


def read_rows(path: str | Path, *, split: str = "train") -> list[dict]:
    """The rows of a .jsonl, .json (also .gz) or .parquet file, a directory of them, a saved dataset, or `hf:name`.

    Strict: UserError with file and line for malformed JSON, a row that is no object, a key given twice, NaN, a lone
    surrogate, bytes that are not UTF-8, or no rows at all. Blank lines and a byte order mark are passed over.
    """
    return [row for _, row in placed_rows(path, split=split)]


def placed_rows(path: str | Path, *, split: str = "train") -> list[tuple[str, dict]]:
    """The rows of `read_rows`, each behind its `file:line`."""
    return [(where, make()) for where, make in _items(path, split, texts=False)]


def first_row(path: str | Path, *, split: str = "train") -> dict:
    """The first row of `read_rows` that can be read; UserError, of the first row, when none can."""
    first = None
    for _, make in _items(path, split, texts=False):
        try:
            return make()
        except UserError as error:
            first = first or error
    raise first


def checked_rows(
    path: str | Path, check: Callable[[Any, str], Any], *, split: str = "train", on_error: str = "stop"
) -> tuple[list[Any], list[str]]:
    """(check(row, where) of every row of `read_rows`, the errors of rows left out), where being `file:line`.

    A row is bad when it cannot be read or `check` raises UserError. on_error "stop": UserError names the first one, and says
    how many there are; "skip": they are left out, if they are at most 1 % of the rows. What is wrong with a whole file
    (missing, truncated, a JSON array that breaks off) is always an error.
    """
    return _checked(_items(path, split, texts=False), check, on_error)


def placed(check: Callable[[Any, str], Any]) -> Callable[[Any, str], tuple[str, Any]]:
    """A check whose rows keep where they stand: (where, check(row, where))."""
    return lambda row, where: (where, check(row, where))


def named(where: str | Sequence[str], i: int) -> str:
    """What an error calls row i of rows that have a place each (`file:line`), or that are counted under one name."""
    return f"{where} row {i + 1}" if isinstance(where, str) else where[i]


def _checked(items: Iterator[Item], check: Callable[[Any, str], Any], on_error: str) -> tuple[list[Any], list[str]]:
    if on_error not in ("stop", "skip"):
        raise UserError(f"config.data.on_error={on_error!r}: choose stop or skip")
    kept, bad, seen = [], [], 0
    for where, make in items:
        seen += 1
        try:
            kept.append(check(make(), where))
        except UserError as error:
            bad.append(_printable(str(error)))
            if len(bad) > MOST_NAMED:
                break
    if bad and (on_error == "stop" or len(bad) > MOST_SKIPPED * seen):
        raise UserError(bad[0] + _how_many(len(bad), seen))
    return kept, bad


def _printable(text: str) -> str:
    """The text as one line that is safe to print: what it quotes of a row may hold line ends and a terminal's escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _how_many(bad: int, seen: int) -> str:
    """What follows the first bad row: whether the rest is good enough to go on without."""
    if bad <= MOST_SKIPPED * seen:
        return f" (fix that row, or leave out {bad:,} of {seen:,} rows with --config.data.on_error=skip)"
    so_far = " so far" if bad > MOST_NAMED else ""
    return f" ({bad:,} of {seen:,} rows are bad{so_far})" if bad > 1 else ""


def split_by_hash(
    documents: Sequence[str], *, held_out: float = 0.02, least: int = 50
) -> tuple[list[str], list[str]]:
    """(train, held out) by each document's sha256: a document keeps its side when others come or go.

    Fewer than `least` documents are first cut behind blank lines into parts of 2,000 characters or more, so that one
    long text has a held-out part too. UserError when `held_out` is not a share in [0, 1).
    """
    if not 0 <= held_out < 1:
        raise UserError(f"held_out {held_out}: a share from 0 up to 1 is needed, such as 0.02")
    if len(documents) < least:
        documents = [part for document in documents for part in _parts(document)]
    sides: tuple[list[str], list[str]] = ([], [])
    for document in documents:
        digest = hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest()
        sides[int.from_bytes(digest[:4], "big") < held_out * 2**32].append(document)
    return sides


def _parts(document: str, size: int = 2000) -> Iterator[str]:
    """The document cut behind blank lines; the parts joined are the document."""
    start = 0
    for blank in re.finditer(r"\n[ \t\r]*\n", document):
        if blank.end() - start >= size <= len(document) - blank.end():
            yield document[start : blank.end()]
            start = blank.end()
    yield document[start:]


# ---- files


def _items(path: str | Path, split: str, *, texts: bool) -> Iterator[Item]:
    """(where, what gives the row or whole text) of everything under `path`; UserError when that is nothing."""
    if str(path).startswith("hf:"):
        yield from hub.rows(hub.load(str(path), split), str(path))
        return
    path = Path(os.path.expanduser(path))  # never raises: a user that is not there is a file that is not there
    if not _guarded(path, path.exists):
        names = os.listdir(path.parent) if os.access(path.parent, os.R_OK | os.X_OK) and path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, 1)
        raise UserError(f"{path}: no such file or directory" + (f"; did you mean {near[0]}?" if near else ""))
    if path.is_dir() and any((path / n).is_file() for n in ("dataset_dict.json", "dataset_info.json", "state.json")):
        yield from hub.rows(hub.from_disk(path, split), str(path))
        return
    readers = {**ROW_READERS, **(TEXT_READERS if texts else {})}
    files = sorted(p for p in path.rglob("*") if _kind(p) in readers) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: a directory without any {', '.join(readers)} file")
    for file in files:
        if _kind(file) not in readers:
            raise UserError(f"{file}: unknown kind of file; {', '.join(readers)} can be read here")
        if not _guarded(file, file.is_file):  # a pipe would be waited for, a link may lead nowhere
            raise UserError(f"{file}: not a file that can be read: give one, or a directory of them")
        empty = True
        for item in readers[_kind(file)](file):
            empty = False
            yield item
        if empty:
            raise UserError(f"{file}: empty: there is nothing to read in it")


def _kind(path: Path) -> str:
    suffixes = [s.lower() for s in path.suffixes]
    hidden = path.name.startswith(".")
    return "" if hidden or not suffixes else suffixes[-2] if suffixes[-1] == ".gz" and suffixes[1:] else suffixes[-1]


def _column(row: dict, column: str, where: str) -> str:
    if column not in row:
        there = ", ".join(map(repr, row)) or "none"
        raise UserError(f"{where}: no column {column!r}; there are {there}: set the column")
    if not isinstance(row[column], str):
        raise UserError(f"{where}: column {column!r} must be a string, found {_snippet(repr(row[column]))}")
    return row[column]


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _guarded(path: Path, read: Callable[[], Any]) -> Any:
    """`read()` with what the system or gzip says of a bad file as one line."""
    try:
        return read()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _utf8(raw: bytes, path: Path, line: int = 1) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        byte, column = raw[error.start], error.start - raw.rfind(b"\n", 0, error.start)
        raise UserError(f"{path}:{line}: not UTF-8 (byte 0x{byte:02x} at {column}): save the file as UTF-8") from None


def _whole(path: Path) -> str:
    def read() -> bytes:
        raw = bytearray()
        with _open(path) as file:
            while block := file.read(2**20):  # a few kB may unpack to more than there is memory
                raw += block
                if len(raw) > MAX_WHOLE:
                    raise UserError(f"{path}: over {MAX_WHOLE // 2**20:,} MiB in one piece: give rows, one a line (.jsonl)")
        return bytes(raw)

    return _utf8(_guarded(path, read).removeprefix(BOM), path)


def _text_items(path: Path) -> Iterator[Item]:
    text = _whole(path)
    if text.strip():
        yield str(path), lambda: text


def _jsonl_items(path: Path) -> Iterator[Item]:
    """Lines end at \\n only: U+2028 and its like are characters of a string."""
    number = 0
    with _guarded(path, lambda: _open(path)) as file:
        while raw := _guarded(path, lambda: file.readline(MAX_LINE + 1)):
            number += 1
            if len(raw) > MAX_LINE:
                raise UserError(f"{path}:{number}: a line of more than {MAX_LINE // 2**20} MiB: one row a line, please")
            line = (raw.removeprefix(BOM) if number == 1 else raw).strip(b" \t\r\n")
            if line:
                yield f"{path}:{number}", partial(_line, raw.removeprefix(BOM) if number == 1 else raw, path, number)


def _line(raw: bytes, path: Path, number: int) -> dict:
    text = _utf8(raw, path, number).strip(" \t\r\n")
    row = _decoded(lambda: DECODER.decode(text), text, path, number)
    return _object_of_text(row, SURROGATE.search(text), f"{path}:{number}")


def _json_items(path: Path) -> Iterator[Item]:
    """A JSON array of objects, or objects one after another, each named by the line on which it begins."""
    text = _whole(path)
    escapes = SURROGATE.search(text)
    at = _skip(text, 0)
    array = text[at : at + 1] == "["
    at = _skip(text, at + array)
    line, counted = 1, 0
    while at < len(text) and not (array and text[at] == "]"):
        line, counted = line + text.count("\n", counted, at), at
        value, at = _decoded(lambda at=at: DECODER.raw_decode(text, at), text, path, line)
        yield f"{path}:{line}", partial(_object_of_text, value, escapes, f"{path}:{line}")
        at = _skip(text, at)
        if array and text[at : at + 1] not in (",", "]"):
            raise UserError(f"{path}:{line + text.count(chr(10), counted, at)}: malformed JSON: ',' or ']' expected")
        at = _skip(text, at + (array and text[at] == ","))
    if array and _skip(text, at + 1) < len(text) or array and at >= len(text):
        raise UserError(f"{path}:{text.count(chr(10)) + 1}: malformed JSON: the array must end the file with ']'")


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _decoded(decode: Callable[[], Any], text: str, path: Path, line: int) -> Any:
    """`decode()` of the row that begins at `line`, `text` being that line or the whole file."""
    try:
        return decode()
    except json.JSONDecodeError as error:
        line = error.lineno if error.lineno > 1 else line
        near = _snippet(text[max(0, error.pos - 20) : error.pos + 40])
        raise UserError(f"{path}:{line}:{error.colno}: malformed JSON ({error.msg}) near {near!r}") from None
    except RecursionError:
        raise UserError(f"{path}:{line}: JSON nested too deep to read") from None
    except ValueError as error:  # from our hooks, or a number of thousands of digits
        raise UserError(f"{path}:{line}: {str(error).split(';')[0]}") from None


def _object(items: list[tuple[str, Any]]) -> dict:
    row = dict(items)
    if len(row) < len(items):
        keys = [k for k, _ in items]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice in one object")
    return row


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON: write a number or null")


def _finite(digits: str) -> float:
    """JSON's grammar has 1e999, which is read as infinity, as if it had been written so."""
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{_snippet(digits)} is too large for a number")
    return number


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite)


def _object_of_text(row: Any, escapes: Any, where: str) -> dict:
    """The row, when it is an object whose strings are text; only where `escapes` is found can one be otherwise."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON object with named columns was expected, found {_snippet(repr(row))}")
    if escapes:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            code = ord(error.object[error.start])
            raise UserError(f"{where}: a lone surrogate \\u{code:04x} in a string: it is no character") from None
    return row


def _snippet(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _parquet_items(path: Path) -> Iterator[Item]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(path)
        for batch in table.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", partial(dict, row)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable parquet file ({hub.first_line(error)})") from None


ROW_READERS = {".jsonl": _jsonl_items, ".json": _json_items, ".parquet": _parquet_items}
TEXT_READERS = {".txt": _text_items, ".md": _text_items}
