"""How arrays lie on a mesh: what a device holds of each, and what every device holds a copy of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

Axes = Mapping[str, tuple[str | None, ...]]  # logical axes by path


class Row(NamedTuple):
    """One array. axes: logical names of its dimensions (None: not known); over: the mesh axes that each is split over.

    shard: the shape of a device's part, of `bytes` bytes; copies: how many devices hold the same part.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]
    over: tuple[tuple[str, ...], ...]
    shard: tuple[int, ...]
    bytes: int
    copies: int

    @property
    def replicated(self) -> bool:
        """Whether each of several devices holds all of it."""
        return self.shard == self.shape and self.copies > 1


def rows(tree: Any, axes: Axes | None = None) -> list[Row]:
    """A Row for every array (or jax.ShapeDtypeStruct with a sharding) of a tree; other leaves are not on devices."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in leaves]
    return [_row(path, x, axes or {}) for path, x in named if getattr(x, "sharding", None) is not None]


def _once(tree: Any) -> Any:
    """The tree with None in place of arrays that it has before."""
    seen: set[int] = set()

    def new(x: Any) -> bool:
        known = len(seen)
        seen.add(id(x))
        return len(seen) > known

    return jax.tree.map(lambda x: x if new(x) else None, tree)


def _row(path: str, x: Any, axes: Axes) -> Row:
    shard = tuple(x.sharding.shard_shape(x.shape))
    spec = tuple(getattr(x.sharding, "spec", ()))
    spec += (None,) * (len(x.shape) - len(spec))
    over = tuple(() if s is None else (s,) if isinstance(s, str) else tuple(s) for s in spec)
    parts = math.prod(whole // part for whole, part in zip(x.shape, shard, strict=True) if part)
    known = axes.get(path, ())
    logical = tuple(known) if len(known) == len(x.shape) else (None,) * len(x.shape)
    size = math.prod(shard) * x.dtype.itemsize
    return Row(path, tuple(x.shape), str(x.dtype), logical, over, shard, size, len(x.sharding.device_set) // parts)


def total(some: Sequence[Row]) -> dict[str, int]:
    """Bytes on a device, bytes of all devices counted once, and of what is replicated: arrays and bytes on a device."""
    whole = [r for r in some if r.replicated]
    return {
        "arrays": len(some), "device": sum(r.bytes for r in some),
        "once": sum(r.bytes * math.prod(r.shape) // max(1, math.prod(r.shard)) for r in some),
        "replicated": len(whole), "replicated_bytes": sum(r.bytes for r in whole),
    }  # fmt: skip


def report(params: Any, frozen: Any, opt_state: Any, mesh: Any, axes: Axes | None = None) -> str:
    """The table of all parameters, and lines on what a device holds of parameters and optimizer and what is replicated.

    A frozen array that stands in two places (a reference in the policy's own buffers) is counted once.
    """
    trained, kept, moments = rows(params, axes), rows(_once(frozen), axes), rows({"optimizer": opt_state})
    sizes = " ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1) or "one device"
    lines = [f"sharding: {sizes} ({mesh.size} device{'s' if mesh.size > 1 else ''})", *_table(trained + kept)]
    for what, some in (("trained parameters", trained), ("frozen parameters", kept), ("optimizer", moments)):
        if some:
            lines.append(_sum(what, some))
    copied = sorted((r for r in trained + kept + moments if r.replicated), key=lambda r: -r.bytes)
    if copied:
        lines.append(f"  largest replicated array: {copied[0].path} {_dims(copied[0].shape)}, {amount(copied[0].bytes)} a device")
    return "\n".join(lines)


def _sum(what: str, some: Sequence[Row]) -> str:
    t = total(some)
    said = f"  {what}: {amount(t['device'])} a device of {amount(t['once'])}"
    return said + (
        f"; replicated: {t['replicated']} of {t['arrays']} arrays, {amount(t['replicated_bytes'])}" if t["replicated"] else ""
    )


def _table(some: Sequence[Row]) -> list[str]:
    """Aligned columns, a line for each row."""
    head = ("parameter", "shape", "dtype", "layout", "a device holds", "bytes", "copies")
    cells = [head] + [
        (r.path, _dims(r.shape), r.dtype, _layout(r), _dims(r.shard), amount(r.bytes), "all" if r.replicated else str(r.copies))
        for r in some
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]


def _layout(row: Row) -> str:
    """layers, embed>fsdp, mlp>tensor: the logical axis and what it is split over."""
    names = (f"{a or '-'}{'>' + '+'.join(o) if o else ''}" for a, o in zip(row.axes, row.over, strict=True))
    return ", ".join(names) or "scalar"


def _dims(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "1"


def amount(size: float) -> str:
    """512 B, 1.5 KiB, 20 MiB, 3.2 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.4g} GiB"
