"""Trees as nested dicts: '/'-joined paths, and splitting a tree by a regular expression on them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict


def flatten(tree: Any) -> dict[str, Any]:
    """{'a': {'b': leaf}} -> {'a/b': leaf}."""
    return flatten_dict(tree, sep="/")


def unflatten(flat: dict[str, Any]) -> Any:
    """The inverse of `flatten`."""
    return unflatten_dict(flat, sep="/")


def map_paths(fn: Callable[[str, Any], Any], tree: Any) -> Any:
    """fn(path, leaf) over the leaves."""
    return unflatten({path: fn(path, leaf) for path, leaf in flatten(tree).items()})


def partition(tree: Any, pattern: str) -> tuple[Any, Any]:
    """(the leaves whose path has a match of `pattern`, the others), each a tree of its own."""
    flat = flatten(tree)
    chosen = {path: leaf for path, leaf in flat.items() if re.search(pattern, path)}
    return unflatten(chosen), unflatten({p: leaf for p, leaf in flat.items() if p not in chosen})


def merge(*trees: Any) -> Any:
    """The union of trees that share no leaf: the inverse of `partition`."""
    union: dict[str, Any] = {}
    for tree in trees:
        flat = flatten(tree)
        if both := union.keys() & flat.keys():
            raise ValueError(f"in more than one tree: {sorted(both)[:5]}")
        union.update(flat)
    return unflatten(union)
