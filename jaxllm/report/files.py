"""Reading and writing the plain files of a run directory: atomic, valid JSON, without secrets."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxllm.report.secrets import clean


def read_jsonl(path: Path | str) -> list[dict[str, Any]]:
    """The rows of an own jsonl file; a line torn by a kill is left out."""
    rows = []
    if Path(path).exists():
        for line in Path(path).read_text(encoding="utf-8").split("\n"):
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that a reader, and a kill, see the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(clean(text))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs ("optim.lr", 1e-3) of a nested dict."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of pairs that `flatten` gave."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def plain(value: Any) -> Any:
    """Only what JSON holds: numpy and jax scalars as floats, arrays as lists, non-finite numbers as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return (value if math.isfinite(value) else None) if isinstance(value, float) else str(value)


def dump(value: Any) -> str:
    """Indented JSON of any tree."""
    return json.dumps(plain(value), indent=2) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} when there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
