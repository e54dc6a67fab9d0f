"""Documents and rows from files: plain text, JSON lines, parquet, `datasets`; every error names the file and the line."""

from __future__ import annotations

import codecs
import difflib
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxllm.core.types import UserError
from jaxllm.data.embedded import embedded, embedded_code, embedded_prose
from jaxllm.data.tokenizer import check_text

__all__ = ["embedded", "embedded_code", "embedded_prose", "read_rows", "read_text", "split_by_hash"]

PLAIN = (".txt", ".md", ".txt.gz")
LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
WHOLE = (".json", ".json.gz")
ROWS = (*LINES, *WHOLE, ".parquet")
READ_ERRORS = (OSError, EOFError, zlib.error)
Located = tuple[str, dict[str, Any]]  # "file:line", row
LONGEST = 64 * 2**20  # bytes of one line of JSON


def read_text(path: str | Path, *, column: str = "text", split: str = "train") -> list[str]:
    """The documents of a file, a directory of files, a saved `datasets` directory, or "hf:name".

    A .txt or .md file is one document; elsewhere it is `column` of each row. Empty documents are skipped.
    UserError when something is missing, empty or not text.
    """
    if _is_dataset(path):
        documents = _column(_from_datasets(path, split), column)
    else:
        documents = [d for file in _files(path, (*PLAIN, *ROWS)) for d in _documents(file, column)]
    documents = [d for d in documents if d.strip()]
    if not documents:
        raise UserError(f"{path} holds no text: give a file with at least one document that is not empty")
    return documents


def read_rows(path: str | Path, *, split: str = "train") -> list[dict[str, Any]]:
    """The rows of .jsonl, .json or .parquet files (also .gz, or a directory of them), of saved `datasets`, or "hf:name".

    UserError naming file and line when a row does not parse, is not an object, or there are none.
    """
    if _is_dataset(path):
        rows = [row for _, row in _from_datasets(path, split)]
    else:
        rows = [row for file in _files(path, ROWS) for _, row in _located(file)]
    if not rows:
        raise UserError(f"{path} has no rows: give a file with at least one")
    return rows


def split_by_hash(documents: Sequence[str], *, held_out: float = 0.02, least: int = 50) -> tuple[list[str], list[str]]:
    """(train, held out) by the sha256 of each document: a document keeps its side when others come or go.

    Fewer than `least` documents are cut at blank lines first (into parts of 2,000 characters or more), so that one
    long text can have a held-out part too.
    """
    if len(documents) < least:
        documents = [part for d in documents for part in _parts(d)]
    bound = int(held_out * 2**64)
    sides: tuple[list[str], list[str]] = ([], [])
    for document in documents:
        digest = hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest()
        sides[int.from_bytes(digest[:8], "big") < bound].append(document)
    return sides


def _parts(document: str, size: int = 2000) -> Iterator[str]:
    """The document cut behind blank lines; the parts joined are the document."""
    start = 0
    for match in re.finditer(r"\n\s*\n", document):
        if match.end() - start >= size and len(document) - match.end() >= size:
            yield document[start : match.end()]
            start = match.end()
    yield document[start:]


def _files(path: str | Path, endings: tuple[str, ...]) -> list[Path]:
    """The file, or the readable files of a directory in the order of their names."""
    path = Path(path)
    if path.is_file():
        if not path.name.lower().endswith(endings):
            raise UserError(f"{path} is of an unknown kind: use one of {', '.join(endings)}")
        return [path]
    if not path.exists():
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, 1)
        hint = f"Did you mean {path.parent / near[0]}?" if near else "Check the path."
        raise UserError(f"{path} does not exist. {hint}")
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name.lower().endswith(endings))
    if not files:
        raise UserError(f"{path} holds no file that can be read here: looked for {', '.join(endings)}")
    return files


def _documents(path: Path, column: str) -> list[str]:
    if not path.name.lower().endswith(PLAIN):
        return _column(_located(path), column)
    try:
        return [_read(path).decode("utf-8-sig")]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from None


def _column(rows: Iterable[Located], column: str) -> list[str]:
    """One text column of rows. UserError naming the row where it is missing or no text."""
    documents = []
    for where, row in rows:
        if not isinstance(row.get(column), str):
            near = difflib.get_close_matches(column, [c for c, v in row.items() if isinstance(v, str)], 1, cutoff=0)
            value = f"is {row[column]!r:.40}, not text" if column in row else f"is not among {', '.join(row) or 'no columns'}"
            hint = f"; set the column, for example to {near[0]!r}" if near else ""
            raise UserError(f"{where}: column {column!r} {value}{hint}")
        documents.append(check_text(row[column], f"{where}: column {column!r}"))
    return documents


def _located(path: Path) -> Iterator[Located]:
    """(where, row) of one file."""
    name = path.name.lower()
    if name.endswith(LINES):
        return _json_lines(path)
    if name.endswith(WHOLE):
        return _json_file(path)
    return _parquet(path)


def _json_lines(path: Path) -> Iterator[Located]:
    """Rows of a file with one JSON object a line; only a line feed ends a line, blank lines are skipped."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, raw in enumerate(iter(lambda: file.readline(LONGEST + 1), b""), 1):
                if len(raw) > LONGEST:
                    raise UserError(f"{path}:{number} is longer than {LONGEST:,} bytes: is it one object a line?")
                raw = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
                if raw.strip():
                    where = f"{path}:{number}"
                    yield where, _object(_parse(raw, where), where)
    except READ_ERRORS as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _json_file(path: Path) -> Iterator[Located]:
    """Rows of a file that is one JSON list of objects; without brackets around it, one object a line."""
    content = _read(path).removeprefix(codecs.BOM_UTF8)
    if not content.lstrip().startswith(b"["):
        yield from _json_lines(path)
        return
    for number, row in enumerate(_parse(content, str(path)), 1):
        yield f"{path} row {number}", _object(row, f"{path} row {number}")


def _parse(raw: bytes, where: str) -> Any:
    """JSON, strictly: no NaN, no key twice, no half characters."""
    try:
        text = raw.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
        if "\\u" in text:  # an escape can spell half of a surrogate pair
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except json.JSONDecodeError as error:
        line = f" line {error.lineno}" if error.lineno > 1 else ""
        near = text[max(0, error.pos - 20) : error.pos + 20].strip()
        raise UserError(f"{where}: malformed JSON at{line} column {error.colno}: {error.msg}, near {near!r}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8: byte {error.start} is {raw[error.start]:#04x}") from None
    except UnicodeEncodeError:
        raise UserError(f"{where}: holds a lone surrogate (an escape like \\ud800), which is not text") from None
    except RecursionError:
        raise UserError(f"{where}: JSON nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(k for i, (k, _) in enumerate(pairs) if k in dict(pairs[:i]))
        raise ValueError(f"key {twice!r} stands twice in one object")
    return row


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON: write a number or null")


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {type(row).__name__}, not an object: each row must be {{...}}")
    return row


def _parquet(path: Path) -> Iterator[Located]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a parquet file that can be read: {str(error).splitlines()[0]}") from None
    for number, row in enumerate(rows, 1):
        yield f"{path} row {number}", row


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except READ_ERRORS as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not content.strip():
        raise UserError(f"{path} is empty")
    return content


def _is_dataset(path: str | Path) -> bool:
    saved = ("dataset_dict.json", "dataset_info.json")
    return str(path).startswith("hf:") or any((Path(path) / name).is_file() for name in saved)


def _from_datasets(path: str | Path, split: str) -> Iterator[Located]:
    """Rows of a saved `datasets` directory, or of "hf:name" or "hf:name:configuration"."""
    import datasets

    try:
        if str(path).startswith("hf:"):
            name, _, configuration = str(path)[3:].partition(":")
            data = datasets.load_dataset(name, configuration or None)
        else:
            data = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever the hub, its network and its cache raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} cannot be loaded: {reason} (offline? give a local path)") from None
    if isinstance(data, dict):
        if split not in data:
            raise UserError(f"{path} has no split {split!r}: it has {', '.join(data)}")
        data = data[split]
    for number, row in enumerate(data, 1):
        yield f"{path} row {number}", row
