"""What reading and writing share: the table of families, and which published names a model has."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxllm.convert.names import Family, Leaf
from jaxllm.core import spec
from jaxllm.core.tree import flatten
from jaxllm.core.types import Model, UserError

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
GROUPS = ("decoders", "experts", "bert", "t5", "imagegpt")  # modules of this folder, each with FAMILIES


@functools.cache
def families() -> dict[str, Family]:
    """Every family that is read and written, by the name of its architecture."""
    found = (family for group in GROUPS for family in importlib.import_module(f"jaxllm.convert.{group}").FAMILIES)
    return {family.architecture: family for family in found}


def find_family(published: dict, where: Path) -> Family:
    """By `architectures`, or, where that is missing, the first of the same model_type. UserError with what is supported."""
    table = families()
    names = published.get("architectures") or []
    names = [str(n) for n in names] if isinstance(names, list) else [str(names)]
    model_type = published.get("model_type")
    found = [table[n] for n in names if n in table] or [f for f in table.values() if not names and f.model_type == model_type]
    if not found:
        what = f"architectures {', '.join(names)[:100]}" if names else f"model_type {model_type!r}"
        raise UserError(f"{where / 'config.json'}: {what} is not supported: {', '.join(table)}")
    return found[0]


class Place(NamedTuple):
    """A leaf's stack: lead, its sizes (layers, experts); shapes and axes of one entry's arrays, per path, `vocab` unpadded."""

    lead: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]


def place(leaf: Leaf, specs: Mapping[str, spec.Spec], vocab: int) -> Place:
    """Where a leaf of the table stands in the model's specs (flattened)."""
    n = ("{i}" in leaf.names[0]) + ("{e}" in leaf.names[0])
    whole = [specs[path] for path in leaf.paths]
    rows = leaf.rows or vocab
    shapes = (tuple(rows if a == "vocab" else s for s, a in zip(w.shape, w.axes, strict=True))[n:] for w in whole)
    return Place(whole[0].shape[:n], tuple(shapes))


def numbered(leaf: Leaf, index: tuple[int, ...]) -> list[str]:
    """The published names of one entry of a stack; index: (layer,) or (layer, expert)."""
    i, e = (*index, 0, 0)[:2]
    if "{i}" not in leaf.names[0]:
        i, e = 0, i
    return [name.replace("{i}", str(i + leaf.start)).replace("{e}", str(e)) for name in leaf.names]


def expected(leaves: list[Leaf], model: Model) -> dict[str, tuple[int, ...]]:
    """Every published name with its shape, as `write` would make it."""
    specs, names = flatten(model.specs), {}
    for leaf in leaves:
        where = place(leaf, specs, model.config.vocab_size)
        # arrays without memory of their own: only their shapes are asked for
        tensors = leaf.write([np.broadcast_to(np.zeros((), np.float32), shape) for shape in where.shapes])
        for index in itertools.product(*map(range, where.lead)):
            names.update(zip(numbered(leaf, index), (t.shape for t in tensors), strict=True))
    return names


def check_size(model: Model, files: Mapping[str, Any], where: Any) -> None:
    """UserError when config.json describes far more than the files hold: a hostile one may describe what no memory holds."""
    described, held = spec.count(model.specs), sum(math.prod(t.shape) for t in files.values())
    if described > 2 * held + 10**6:
        raise UserError(
            f"{where}: config.json describes {described:,} parameters, the files hold {held:,}: they do not belong together"
        )


def check_names(files: Mapping[str, Any], want: Mapping[str, tuple], ignored: str, where: Any) -> None:
    """UserError listing the first five names that are missing, unknown, or of another shape."""
    missing = [f"{n} {want[n]}" for n in want if n not in files]
    unknown = [f"{n} {files[n].shape}" for n in files if n not in want and not re.fullmatch(ignored, n)]
    differ = [f"{n}: here {want[n]}, in the file {files[n].shape}" for n in want if n in files and files[n].shape != want[n]]
    kinds = (("missing", missing), ("unknown", unknown), ("of another shape", differ))
    said = [f"{len(names)} {what}: {'; '.join(names[:5])}" for what, names in kinds if names]
    if said:
        raise UserError(f"{where}: the tensors are not those of its config.json: {' | '.join(said)}")


def renamed(files: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Names in files of older spellings, as the table has them."""

    def new(name: str) -> str:
        return functools.reduce(lambda n, rule: re.sub(rule[0], rule[1], n), family.renames, name)

    return {new(name): tensor for name, tensor in files.items()}
