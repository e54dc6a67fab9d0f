"""Checkpoints: <workdir>/checkpoints/<step>/{params,opt_state,data,meta}, written by Orbax, with a manifest of checksums.

`params`, `opt_state`, `data` and `meta` are separate items, so that the next stage, generation and plain Orbax restore
`params` alone. Orbax commits a step by a rename, and loads flipped bits without a word: the manifest (crc32 of every file)
is written after the commit and checked before a restore. Of several processes, which must see one directory, each writes its
own shards; process 0 alone looks for damage, moves steps aside and writes manifests, and the others go by what it found.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.core.types import Params, TrainState, UserError
from jaxllm.train import processes

MANIFEST = "MANIFEST.json"


@dataclass(frozen=True)
class Checkpoints:
    """An open checkpoint directory. save returns at once; close waits for what is under way."""

    directory: Path
    save: Callable[[TrainState, dict, dict], None]  # (state, data, meta)
    restore: Callable[[TrainState], tuple[TrainState, dict, dict] | None]  # onto the shardings of a like state
    close: Callable[[], None]


def open_checkpoints(workdir: Path | str, *, keep: int = 2, warn: Callable[[str], None] = print) -> Checkpoints:
    """Checkpoints under workdir/checkpoints, the newest `keep` kept.

    restore(like) gives (state, data, meta) of the newest step that is whole, or None when there is none; a damaged step is
    moved to <step>.corrupt with a warning and the next older one is used. UserError when all of them are damaged.
    """
    import orbax.checkpoint as ocp

    directory = Path(workdir).absolute() / "checkpoints"
    manager = ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True, create=True),
        item_names=("params", "opt_state", "data", "meta"),
        item_handlers=None,
    )

    def save(state: TrainState, data: dict, meta: dict) -> None:
        _write_manifests(directory, manager)
        if jax.default_backend() == "cpu":
            # the step donates its buffers, and on CPU Orbax may still be reading them while it writes
            state = jax.block_until_ready(jax.tree.map(jnp.copy, state))
        step = int(state.step)
        manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params), opt_state=ocp.args.StandardSave(state.opt_state),
                data=ocp.args.JsonSave(data), meta=ocp.args.JsonSave({**meta, "step": step}),
            ),
        )  # fmt: skip

    def restore(like: TrainState) -> tuple[TrainState, dict, dict] | None:
        found = whole_steps(directory, warn)
        manager.reload()  # it must forget the steps that were moved aside, or it skips saving them again without a word
        if not found:
            return None
        abstract = jax.tree.map(_abstract, like)
        items = manager.restore(
            found[-1],
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract.params), opt_state=ocp.args.StandardRestore(abstract.opt_state),
                data=ocp.args.JsonRestore(), meta=ocp.args.JsonRestore(),
            ),
        )  # fmt: skip
        step = _like(items["meta"]["step"], like.step)
        return TrainState(step, items["params"], items["opt_state"]), items["data"], items["meta"]

    def close() -> None:
        _write_manifests(directory, manager)
        manager.close()

    return Checkpoints(directory, save, restore, close)


def _like(step: int, x: Any) -> Any:
    """The step where the state's own counter lies, if that is over several processes."""
    step = jnp.asarray(step, jnp.int32)
    return step if getattr(x, "is_fully_addressable", True) else jax.device_put(step, x.sharding)


def _abstract(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))


META = {"model": dict, "roots": list, "tokenizer": str, "config": dict, "step": int}  # what is read of a run's meta


def run_meta(workdir: Path | str, step: int | None = None) -> dict:
    """The newest_meta of a run, whose model can be made of it. UserError when it is not what a run writes."""
    try:
        meta = newest_meta(workdir, step)
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{workdir}: the meta of its checkpoint is not readable ({str(error)[:80]}): name another step") from None
    for name, kind in META.items():
        if not isinstance(meta, dict) or not isinstance(meta.get(name), kind):
            raise UserError(
                f"{workdir}: `{name}` is missing in its checkpoint's meta, or no {kind.__name__}: it was not written by jaxllm, "
                "or changed since; name another step"
            )
    return meta


def newest_meta(workdir: Path | str, step: int | None = None) -> dict:
    """The meta of a step (default: the newest whole one). UserError when there is none."""
    return json.loads((_step_directory(workdir, step) / "meta" / "metadata").read_text())


def _step_directory(workdir: Path | str, step: int | None) -> Path:
    directory = Path(workdir).absolute() / "checkpoints"
    found = whole_steps(directory, print)
    if not found or (step is not None and step not in found):
        have = f"it has steps {found}" if found else "there is none"
        wanted = "a checkpoint" if step is None else f"checkpoint {step}"
        raise UserError(f"{workdir}: no {wanted} under {directory.name}/: {have}")
    return directory / str(found[-1] if step is None else step)


def restore_params(workdir: Path | str, step: int | None = None, like: Params | None = None) -> tuple[Params, dict]:
    """(params, meta) of a step (default: the newest whole one) of a run directory.

    like: a tree of ShapeDtypeStructs, with shardings to restore onto a mesh; without it plain arrays on the default device.
    UserError when there is no checkpoint, or when the shapes differ (the first five are named).
    """
    import orbax.checkpoint as ocp

    where = _step_directory(workdir, step)
    meta = json.loads((where / "meta" / "metadata").read_text())
    with ocp.StandardCheckpointer() as checkpointer:
        stored = _stored(checkpointer, where / "params")
        if like is None:
            here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            like = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=here), stored)
        else:
            _check_shapes(where, like, stored)
        return checkpointer.restore(where / "params", like), meta


def _stored(checkpointer: Any, where: Path) -> Any:
    """Shapes and dtypes of an item, without Orbax's warning that the item is not a whole checkpoint."""
    from absl import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        return checkpointer.metadata(where).item_metadata.tree
    finally:
        logging.set_verbosity(level)


def _check_shapes(where: Path, like: Params, stored: Any) -> None:
    from jaxllm.core.tree import flatten

    want, have = ({p: (tuple(x.shape), str(x.dtype)) for p, x in flatten(t).items()} for t in (like, stored))
    none = (None, None)
    pairs = {p: tuple(zip(want.get(p, none), have.get(p, none), strict=True)) for p in sorted(want | have)}
    different = {p: next((pair for pair in both if pair[0] != pair[1]), None) for p, both in pairs.items()}
    differ = [f"{p}: here {pair[0]}, there {pair[1]}" for p, pair in different.items() if pair]
    if differ:
        raise UserError(f"{where}: the checkpoint is of another architecture ({len(differ)} differ): " + "; ".join(differ[:5]))


def whole_steps(directory: Path, warn: Callable[[str], None]) -> list[int]:
    """good_steps as process 0 found them: one process reads the files and moves what is damaged."""
    return processes.from_first(lambda: good_steps(directory, warn))


def good_steps(directory: Path, warn: Callable[[str], None]) -> list[int]:
    """The steps that are whole, oldest first. Damaged ones are moved aside; UserError when only damaged ones are there."""
    steps = sorted(int(p.name) for p in directory.glob("*") if p.name.isdigit()) if directory.exists() else []
    good = []
    for step in steps:
        if (problem := damage(directory / str(step))) is None:
            good.append(step)
        else:
            aside = directory / f"{step}.corrupt"
            shutil.rmtree(aside, ignore_errors=True)
            (directory / str(step)).rename(aside)
            warn(f"checkpoint {directory / str(step)} is damaged: {problem}; moved to {aside.name}")
    if steps and not good:
        raise UserError(f"{directory}: no usable checkpoint: all of {steps} are damaged; start again in another --workdir")
    return good


def damage(step_directory: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Without a manifest only its items are looked for."""
    missing = [item for item in ("params", "opt_state", "data", "meta") if not (step_directory / item).is_dir()]
    if missing:
        return f"{missing[0]} is missing"
    path = step_directory / MANIFEST
    if not path.exists():
        return None  # committed by Orbax, but stopped before its manifest was written
    try:
        expected = json.loads(path.read_text())["files"]
    except (ValueError, KeyError):
        return f"{MANIFEST} is unreadable"
    for name, (size, crc) in expected.items():
        file = step_directory / name
        if not file.exists():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, expected {size}"
        if _crc(file) != crc:
            return f"{name} has crc32 {_crc(file):08x}, expected {crc:08x}"
    return None


def _crc(file: Path) -> int:
    value = 0
    with file.open("rb") as f:
        while block := f.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def _write_manifests(directory: Path, manager: Any) -> None:
    """A manifest for every committed step that has none, by process 0; the others wait."""
    manager.wait_until_finished()
    processes.first_only(lambda: [_write_manifest(directory / str(step)) for step in manager.all_steps()])


def _write_manifest(root: Path) -> None:
    if not root.exists() or (root / MANIFEST).exists():
        return
    files = sorted(p for p in root.rglob("*") if p.is_file())
    listed = {str(p.relative_to(root)): (p.stat().st_size, _crc(p)) for p in files}
    part = root / (MANIFEST + ".part")
    with part.open("w") as f:
        json.dump({"files": listed}, f)
        f.flush()
        os.fsync(f.fileno())
    part.rename(root / MANIFEST)
