"""Checkpoints: <workdir>/checkpoints/<step>/{params,opt_state,data,meta}, written by Orbax, with a manifest of checksums.

`params`, `opt_state`, `data` and `meta` are separate items, so that the next stage, generation and plain Orbax restore
`params` alone. Orbax commits a step by a rename, and loads flipped bits without a word: the manifest (crc32 of every file)
is written right after the commit, in the background too, and checked before a restore. Only behind a verified step are older
ones deleted. Of several processes, which must see one directory, each writes its own shards; process 0 alone looks for damage,
moves steps aside, writes manifests and deletes, and the others go by what it found.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core.types import Params, TrainState, UserError
from jaxllm.train import faults, manifest, processes
from jaxllm.train.manifest import MANIFEST as MANIFEST

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FULL_WORDS = ("No space left on device", "Disk quota exceeded", "File too large")
FAILURES = 3  # saves that may fail in a row
NEEDED = 2.2  # checkpoints that a new run must have room for


@dataclass(frozen=True)
class Checkpoints:
    """An open checkpoint directory. save returns at once; close waits for what is under way.

    again(wait) is True when the last save has failed for want of room, some was made, and it should be made again now.
    """

    directory: Path
    save: Callable[[TrainState, dict, dict], None]  # (state, data, meta)
    restore: Callable[[TrainState], tuple[TrainState, dict, dict] | None]  # onto the shardings of a like state
    again: Callable[[bool], bool]
    close: Callable[[], None]


def open_checkpoints(workdir: Path | str, *, keep: int = 2, warn: Callable[[str], None] = print) -> Checkpoints:
    """Checkpoints under workdir/checkpoints, the newest `keep` verified ones kept.

    restore(like) gives (state, data, meta) of the newest step that is whole, or None when there is none; a damaged step is
    moved to <step>.corrupt with a warning and the next older one is used. UserError (code 74) when all of them are damaged. On a
    full disk training goes on: what can go is deleted, the save is made once more, and OSError comes after FAILURES in a row or
    from close when the last save is not there. Several processes do not try again: OSError comes at once.
    """
    import orbax.checkpoint as ocp

    _quieten()
    directory = Path(workdir).absolute() / "checkpoints"
    processes.first_only(lambda: _clear(directory, warn))
    manager = ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(max_to_keep=None, enable_async_checkpointing=True, create=True),
        item_names=manifest.ITEMS,
        item_handlers=None,
    )
    finish, again, check = _behind(directory, manager, keep, warn)

    def save(state: TrainState, data: dict, meta: dict) -> None:
        again(True)
        if jax.default_backend() == "cpu":
            # the step donates its buffers, and on CPU Orbax may still be reading them while it writes
            state = jax.block_until_ready(jax.tree.map(jnp.copy, state))
        step = int(state.step)

        def begin() -> None:
            _check_room(directory, _bytes(state))
            params, opt_state = map(ocp.args.StandardSave, (state.params, state.opt_state))
            data_args, meta_args = ocp.args.JsonSave(data), ocp.args.JsonSave({**meta, "step": step})
            manager.save(step, args=ocp.args.Composite(params=params, opt_state=opt_state, data=data_args, meta=meta_args))
            faults.point("mid:save")

        finish(step, begin)

    def restore(like: TrainState) -> tuple[TrainState, dict, dict] | None:
        processes.first_only(lambda: _check_new(directory, _bytes(like)))
        step = whole_step(directory, warn)
        manager.reload()  # it must forget the steps that were moved aside, or it skips saving them again without a word
        if step is None:
            return None
        faults.point("mid:restore")
        params, opt_state = (ocp.args.StandardRestore(jax.tree.map(_abstract, x)) for x in (like.params, like.opt_state))
        json_args = ocp.args.JsonRestore()
        items = manager.restore(
            step, args=ocp.args.Composite(params=params, opt_state=opt_state, data=json_args, meta=json_args)
        )
        processes.first_only(lambda: manifest.write(directory / str(step)))  # of one that was stopped before it had one
        count = _like(items["meta"]["step"], like.step)
        return TrainState(count, items["params"], items["opt_state"]), items["data"], items["meta"]

    def close() -> None:
        try:
            check()
        finally:
            manager.close()

    return Checkpoints(directory, save, restore, again, close)


def _behind(directory: Path, manager: Any, keep: int, warn: Callable[[str], None]) -> tuple[Callable, Callable, Callable]:
    """(finish(step, begin), again(wait), check()): what comes behind a save, in a thread, and what became of it."""
    thread: threading.Thread | None = None
    found: list[Exception] = []
    tries = 0  # that failed in a row; a save is tried twice

    def verify(step: int) -> None:
        try:
            manager.wait_until_finished()
            faults.point("before:manifest")
            if jax.process_index() == 0:
                manifest.write(directory / str(step))
                faults.point("after:manifest")
                manifest.trim(directory, keep)
        except Exception as error:  # raised where the loop asks
            found.append(error)

    def finish(step: int, begin: Callable[[], None]) -> None:
        nonlocal thread
        try:
            begin()
        except Exception as error:
            found.append(error)
            return
        thread = threading.Thread(target=verify, args=(step,), name="manifest")
        thread.start()

    def again(wait: bool = False) -> bool:
        nonlocal thread, tries
        if thread is not None and (wait or not thread.is_alive()):
            thread.join()
            thread, tries = None, tries if found else 0
        if not found:
            return False
        error = found.pop()
        if not is_full(error) or not processes.alone():
            raise error
        tries += 1
        return _again(directory, error, tries, warn)

    def check() -> None:
        again(True)
        if tries:
            raise OSError(errno.ENOSPC, f"the last checkpoint could not be written. {_have(directory)}")

    return finish, again, check


def _again(directory: Path, error: Exception, tries: int, warn: Callable[[str], None]) -> bool:
    """Make room after the first try of a save; OSError after the last try of the last save."""
    said = f"a checkpoint could not be written ({_short(error)}). {_have(directory)}"
    if tries % 2:
        warn(f"{said}; deleted {', '.join(manifest.make_room(directory)) or 'nothing'}, trying once more")
        return True
    manifest.clear(directory)
    if tries // 2 >= FAILURES:
        raise OSError(errno.ENOSPC, f"{said}; {FAILURES} saves in a row have failed")
    warn(f"{said}; TRAINING GOES ON WITHOUT IT: make room, or what is trained from here on is lost")
    return False


def is_full(error: BaseException) -> bool:
    """Whether an error, of the system or out of Orbax, says that there is no room on the disk."""
    return getattr(error, "errno", None) in FULL or any(words in str(error) for words in FULL_WORDS)


def _short(error: Exception) -> str:
    """The system's own words in an error of Orbax."""
    return next((words for words in FULL_WORDS if words in str(error)), str(error).splitlines()[0][:200])


def _have(directory: Path) -> str:
    steps = manifest.steps_of(directory)
    size = manifest.size_of(directory / str(steps[-1])) if steps else 0
    need = f"a checkpoint takes {manifest.shown(size)}, " if size else ""
    return f"{need}{manifest.shown(manifest.room(directory))} are free under {directory}"


def _check_room(directory: Path, need: int) -> None:
    """OSError when a checkpoint will not fit; what the newest one took is a better guess than the arrays' bytes."""
    if steps := manifest.steps_of(directory):
        need = manifest.size_of(directory / str(steps[-1]))
    if processes.alone() and manifest.room(directory) < need:
        raise OSError(errno.ENOSPC, f"it needs about {manifest.shown(need)}")


def _check_new(directory: Path, size: int) -> None:
    """OSError before anything is compiled when the disk cannot hold the checkpoints of a run."""
    held = sum(manifest.size_of(directory / str(step)) for step in manifest.steps_of(directory))
    if manifest.room(directory) + held < NEEDED * size:
        raise OSError(
            errno.ENOSPC,
            f"checkpoints need about {manifest.shown(NEEDED * size)}, {manifest.shown(manifest.room(directory))} are free under "
            f"{directory}",
        )


def _bytes(state: TrainState) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state.params, state.opt_state)))


def _clear(directory: Path, warn: Callable[[str], None]) -> None:
    """Remove what a stopped save left; said aloud where no other step is there, because the run then begins again."""
    left = manifest.clear(directory)
    if left and not manifest.steps_of(directory):
        warn(f"the first checkpoint was not complete when the run was stopped; removed {', '.join(left)}")


def _quieten() -> None:
    """Orbax logs a full disk with several tracebacks before it raises; our line says it."""
    logger = logging.getLogger("absl")
    if _not_full not in logger.filters:
        logger.addFilter(_not_full)


def _not_full(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return not (is_full(error) if error else any(words in record.getMessage() for words in FULL_WORDS))


def _like(step: int, x: Any) -> Any:
    """The step where the state's own counter lies, if that is over several processes."""
    step = jnp.asarray(step, jnp.int32)
    return step if getattr(x, "is_fully_addressable", True) else jax.device_put(step, x.sharding)


def _abstract(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))


META = {"model": dict, "roots": list, "tokenizer": str, "config": dict, "step": int}  # what is read of a run's meta
LORA = {"rank": int, "alpha": (int, float), "match": str, "scaling": str}  # and of each of its adapters, where there are any


def run_meta(workdir: Path | str, step: int | None = None) -> dict:
    """The newest_meta of a run, whose model can be made of it. UserError when it is not what a run writes."""
    try:
        meta = newest_meta(workdir, step)
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{workdir}: the meta of its checkpoint is not readable ({str(error)[:80]}): name another step") from None
    if fault := _meta_fault(meta):
        raise UserError(
            f"{workdir}: {fault} in its checkpoint's meta: it was not written by jaxllm, or changed since; name another step"
        )
    return meta


def _meta_fault(meta: Any) -> str | None:
    """The first part of a meta that is not what a run writes."""
    missing = lambda x, kinds: [n for n, kind in kinds.items() if not isinstance(x, dict) or not isinstance(x.get(n), kind)]  # noqa: E731
    for name in missing(meta, META):
        return f"`{name}` is missing or no {META[name].__name__}"
    if not meta["roots"] or not all(isinstance(root, str) for root in meta["roots"]):
        return "`roots` is no list of names"
    adapters = meta.get("lora", {})
    if not isinstance(adapters, dict):
        return "`lora` is no dict"
    for root, given in adapters.items():
        if bad := missing(given, LORA) or sorted(given.keys() - LORA.keys()):
            return f"`lora/{root}/{bad[0]}` is missing or of another type"
    return None


def newest_meta(workdir: Path | str, step: int | None = None) -> dict:
    """The meta of a step (default: the newest whole one). UserError when there is none."""
    return json.loads((_step_directory(workdir, step) / "meta" / "metadata").read_text())


def _step_directory(workdir: Path | str, step: int | None) -> Path:
    """Where a whole step is; another than the newest is checked too, but not replaced by an older one."""
    directory = Path(workdir).absolute() / "checkpoints"
    if step is None and (step := whole_step(directory, print)) is not None:
        return directory / str(step)
    steps = manifest.steps_of(directory)
    if step not in steps:
        have = f"it has steps {steps}" if steps else "there is none"
        wanted = "a checkpoint" if step is None else f"checkpoint {step}"
        raise UserError(f"{workdir}: no {wanted} under {directory.name}/: {have}")
    if problem := processes.from_first(lambda: manifest.damage(directory / str(step))):
        raise UserError(f"{directory / str(step)} is damaged: {problem}; it has steps {steps}")
    return directory / str(step)


def restore_params(
    workdir: Path | str, step: int | None = None, like: Params | None = None, *, cast: bool = False
) -> tuple[Params, dict]:
    """(params, meta) of a step (default: the newest whole one) of a run directory.

    like: a tree of ShapeDtypeStructs, with shardings to restore onto a mesh; without it plain arrays on the default device.
    cast: convert weights of another dtype. UserError when there is no checkpoint, or when shapes or, without cast, dtypes differ
    (the first five are named).
    """
    import orbax.checkpoint as ocp

    where = _step_directory(workdir, step)
    meta = json.loads((where / "meta" / "metadata").read_text())
    with ocp.StandardCheckpointer() as checkpointer:
        if like is None:
            like = _here(checkpointer, where / "params")
        else:
            _check_shapes(where, like, _stored(checkpointer, where / "params"), cast)
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


def _check_shapes(where: Path, like: Params, stored: Any, cast: bool) -> None:
    """Orbax converts a dtype without a word: float32 weights would be bfloat16 ones."""
    from jaxllm.core.tree import flatten

    want, have = ({p: (tuple(x.shape), str(x.dtype)) for p, x in flatten(t).items()} for t in (like, stored))
    none = (None, None)
    pairs = {p: tuple(zip(want.get(p, none), have.get(p, none), strict=True)) for p in sorted(want | have)}
    different = {p: next((pair for pair in both if pair[0] != pair[1]), None) for p, both in pairs.items()}
    shapes = {p: pair for p, pair in different.items() if pair and not all(isinstance(x, str) for x in pair)}
    differ = [f"{p}: here {pair[0]}, there {pair[1]}" for p, pair in (shapes or different).items() if pair]
    if differ and not shapes and not cast:
        raise UserError(
            f"{where}: its weights have another dtype ({len(differ)} differ): {'; '.join(differ[:5])}; nothing is converted by "
            "itself: add --cast to the command (in Python: cast=True) to convert them"
        )
    if shapes:
        raise UserError(f"{where}: the checkpoint is of another architecture ({len(differ)} differ): " + "; ".join(differ[:5]))


def whole_step(directory: Path, warn: Callable[[str], None]) -> int | None:
    """manifest.newest_whole as process 0 found it: one process reads the files and moves what is damaged."""
    return processes.from_first(lambda: manifest.newest_whole(directory, warn))


def digest(workdir: Path | str, step: int | None = None) -> str:
    """SHA-256 of a step (default: the newest whole one): every parameter, the optimizer's state, the data's state, the step.

    Two runs with equal digests have trained the same: names, shapes, dtypes and bits.
    """
    import orbax.checkpoint as ocp

    where = _step_directory(workdir, step)
    total = hashlib.sha256(f"{where.name} {(where / 'data' / 'metadata').read_text()}".encode())
    with ocp.StandardCheckpointer() as checkpointer:
        for item in ("params", "opt_state"):
            restored = checkpointer.restore(where / item, _here(checkpointer, where / item))
            for path, x in jax.tree_util.tree_flatten_with_path(restored)[0]:
                x = np.asarray(x)
                total.update(f"{item}{jax.tree_util.keystr(path)} {x.dtype} {x.shape};".encode())
                total.update(np.ascontiguousarray(x).tobytes())
    return total.hexdigest()


def _here(checkpointer: Any, where: Path) -> Any:
    """An item's tree as shapes on this process's first device."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=here), _stored(checkpointer, where))
