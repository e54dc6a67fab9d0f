"""The files of a checkpoint directory: checksums, what is whole, what may go, and how much room there is.

A step is verified once <step>/MANIFEST.json lists the size and crc32 of every file. Old steps are moved aside before their files
are deleted, so that a kill leaves a step whole or nameless.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxllm.core.types import UserError
from jaxllm.train import faults

MANIFEST = "MANIFEST.json"
BROKEN_DISK = 74
ITEMS = ("params", "opt_state", "data", "meta")
DELETED = ".deleted"
LEFT = re.compile(r"\d+(\.orbax-checkpoint-tmp.*|\.deleted)")  # what a stopped save or deletion leaves


def steps_of(directory: Path) -> list[int]:
    """The steps that Orbax has committed, oldest first."""
    return sorted(int(p.name) for p in directory.glob("*") if p.name.isdigit()) if directory.exists() else []


def is_verified(step_directory: Path) -> bool:
    """Whether it has its checksums."""
    return (step_directory / MANIFEST).exists()


def write(root: Path) -> None:
    """The manifest of a committed step, under its name only when it is on the disk; nothing when it is there."""
    if not root.exists() or is_verified(root):
        return
    files = sorted(p for p in root.rglob("*") if p.is_file() and not p.name.startswith(MANIFEST))
    listed = {str(p.relative_to(root)): (p.stat().st_size, crc(p)) for p in files}
    part = root / (MANIFEST + ".part")
    with part.open("w") as f:
        json.dump({"files": listed}, f)
        f.flush()
        os.fsync(f.fileno())
    faults.point("mid:manifest")
    part.rename(root / MANIFEST)
    sync(root)
    sync(root.parent)  # the step's own name, before older ones are deleted behind it


def sync(directory: Path) -> None:
    """Have a directory's names on the disk, where the system can."""
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:  # a file system without it
        pass
    finally:
        os.close(handle)


def crc(file: Path) -> int:
    """crc32 of a file."""
    value = 0
    with file.open("rb") as f:
        while block := f.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


# ---- what is whole


def damage(step_directory: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Without a manifest only its items are looked for."""
    missing = [item for item in ITEMS if not (step_directory / item).is_dir()]
    if missing:
        return f"{missing[0]} is missing"
    if not is_verified(step_directory):
        return None  # committed by Orbax, but stopped before its manifest was written
    try:
        expected = json.loads((step_directory / MANIFEST).read_text())["files"]
        wrong = (_wrong(step_directory, name, *what) for name, what in expected.items())
        return next(filter(None, wrong), None)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is unreadable"


def _wrong(root: Path, name: str, size: int, expected: int) -> str | None:
    file = root / name
    if not file.is_file():
        return f"{name} is missing"
    if file.stat().st_size != size:
        return f"{name} has {file.stat().st_size} bytes, expected {size}"
    try:
        found = crc(file)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return f"{name} cannot be read ({error.strerror})"
    if found != expected:
        return f"{name} has crc32 {found:08x}, expected {expected:08x}"
    return None


def newest_whole(directory: Path, warn: Callable[[str], None]) -> int | None:
    """The newest step that is whole, None where there is no step. Damaged ones are moved aside; UserError when all are."""
    steps = steps_of(directory)
    for step in reversed(steps):
        if (problem := damage(directory / str(step))) is None:
            return step
        if not (directory / str(step)).exists():  # the run that writes here has deleted it meanwhile: it has a newer one
            return newest_whole(directory, warn)
        aside = directory / f"{step}.corrupt"
        shutil.rmtree(aside, ignore_errors=True)
        (directory / str(step)).rename(aside)
        warn(f"checkpoint {directory / str(step)} is damaged: {problem}; moved to {aside.name}")
    aside = sorted(p.name for p in directory.glob("*.corrupt")) if directory.exists() else []
    if steps or aside:
        error = UserError(
            f"{directory}: no usable checkpoint: all of {steps or aside} are damaged; start again in another --workdir"
        )
        error.code = BROKEN_DISK
        raise error
    return None


# ---- what may go


def trim(directory: Path, keep: int) -> None:
    """Delete the steps behind the newest `keep` verified ones: the last verified one always stays."""
    steps = steps_of(directory)
    kept = [step for step in steps if is_verified(directory / str(step))][-max(keep, 1) :]
    for step in steps:
        if kept and step < kept[0]:
            delete(directory / str(step))


def delete(step_directory: Path) -> None:
    """Take a step out of sight, then delete it."""
    aside = step_directory.with_name(step_directory.name + DELETED)
    shutil.rmtree(aside, ignore_errors=True)
    step_directory.rename(aside)
    faults.point("mid:delete")
    shutil.rmtree(aside, ignore_errors=True)
    faults.point("after:delete")


def clear(directory: Path) -> list[str]:
    """Delete what stopped saves and deletions have left; the names."""
    left = sorted(p for p in directory.glob("*") if LEFT.fullmatch(p.name)) if directory.exists() else []
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in left]


def make_room(directory: Path) -> list[str]:
    """Delete what is left over, and the oldest step that is not the newest verified one; the names."""
    gone = clear(directory)
    steps = steps_of(directory)
    protected = [step for step in steps if is_verified(directory / str(step))][-1:] or steps[-1:]
    if spare := [step for step in steps if step not in protected]:
        delete(directory / str(spare[0]))
        gone.append(str(spare[0]))
    return gone


# ---- room


def size_of(directory: Path) -> int:
    """Bytes of the files under a directory."""
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())


def room(directory: Path) -> int:
    """Free bytes where a directory is, or will be."""
    usage = shutil.disk_usage(next(p for p in (directory, *directory.parents) if p.exists()))
    return usage.free if usage.total else sys.maxsize  # a file system that does not say


def shown(count: Any) -> str:
    """12.3 MB."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"
