"""Where a run begins: at the newest whole checkpoint, if what it holds belongs to this config and these rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxllm.core import tree
from jaxllm.core.types import UserError
from jaxllm.data.loader import check_state
from jaxllm.report.resume import named_by
from jaxllm.train import faults


def restored(store: Any, run: Any, loader: Any, state: Any, whole: Callable, steps: int) -> Any:
    """The state of the newest whole checkpoint, or the given one; metrics behind it are cut off, they will be written again."""
    found = _fitting(lambda: store.restore(whole(state)), run)
    if found is None:
        run.truncate(0)
        return state
    faults.point("after:restore")
    moving = tree.flatten(state.params).keys()
    state, data, _ = found
    if not named_by(run.allowed or (), "data.path"):
        check_state(loader, data, "" if run.allowed is None else "; to go on with other rows all the same, add --allow=data")
    run.truncate(int(state.step))
    run.note(f"resumed at step {int(state.step)} of {steps}")
    return state.replace(params=tree.unflatten({p: x for p, x in tree.flatten(state.params).items() if p in moving}))


def _fitting(restore: Callable[[], Any], run: Any) -> Any:
    """What restore() gives; when settings were allowed to differ and it does not fit them, that is a mistake and no bug."""
    try:
        return restore()
    except (ValueError, KeyError, TypeError) as error:
        if not run.allowed:
            raise
        raise UserError(
            f"--allow={','.join(run.allowed)}: the checkpoint does not fit these settings ({str(error).splitlines()[0][:120]}): "
            "shapes and the kind of optimizer stay what they were; give another --workdir for others"
        ) from error
