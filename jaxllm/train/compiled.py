"""Every jitted function of a run is compiled once: another compilation is found, named, and ends the run."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"  # jax records one for every program, from the compile cache too


class Recompiled(Exception):
    """A function was compiled again: its arguments are not what they were, which is a bug and costs minutes on large models."""


@functools.cache
def programs() -> list[tuple[int, str]]:
    """(thread, name) of every program compiled in this process since the first call; the list grows."""
    seen: list[tuple[int, str]] = []

    def listen(event: str, seconds: float, **about: Any) -> None:
        if event == COMPILED:
            seen.append((threading.get_ident(), str(about.get("fun_name", "?"))))

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seen


def counted(fn: Callable, name: str, planned: int = 1) -> Callable:
    """A jitted fn that may compile in its first `planned` calls; Recompiled when a later one does, with what has changed.

    Nothing is waited for. What is not jitted, and so is more than one program, is returned as it is.
    """
    if not hasattr(fn, "lower"):
        return fn
    seen, calls, known = programs(), 0, {}

    @functools.wraps(fn)
    def call(*args: Any) -> Any:
        nonlocal calls, known
        if calls < planned:
            known = signature(fn, args)
        before = len(seen)
        out = fn(*args)
        calls += 1
        if len(seen) > before and calls > planned:
            me = threading.get_ident()
            if found := [program for thread, program in seen[before:] if thread == me]:
                raise Recompiled(_message(name, calls, found, known, signature(fn, args)))
        return out

    call.lower = fn.lower  # still a program, for those who compile ahead of time
    return call


def signature(fn: Callable, args: tuple) -> dict[str, str]:
    """{path: what jax compiles for} of a call's leaves: dtype, shape, weak type, sharding; deleted arrays keep it."""
    names = list(inspect.signature(fn).parameters)
    leaves, _ = jax.tree_util.tree_flatten_with_path(args)
    flat = {}
    for path, leaf in leaves:
        first = names[path[0].idx] if path[0].idx < len(names) else str(path[0].idx)
        flat["/".join(filter(None, (first, jax.tree_util.keystr(path[1:], simple=True, separator="/"))))] = describe(leaf)
    return flat


def describe(x: Any) -> str:
    """float32[8,32] over P('data', None), as jax tells arguments apart."""
    if not isinstance(x, jax.Array):
        return f"{getattr(x, 'dtype', type(x).__name__)}{list(getattr(x, 'shape', ()))} of the host"
    kind = f"{x.dtype}[{','.join(map(str, x.shape))}]" + (" weakly typed" if getattr(x, "weak_type", False) else "")
    where = f"{x.sharding.spec} on {dict(x.sharding.mesh.shape)}" if hasattr(x.sharding, "spec") else str(x.sharding)
    return f"{kind} over {where}" + ("" if getattr(x, "committed", True) else ", not committed")


def _message(name: str, call: int, programs: list[str], before: dict[str, str], now: dict[str, str]) -> str:
    """What differs between two calls' signatures, one leaf in full."""
    changed = [path for path in sorted(before.keys() | now.keys()) if before.get(path) != now.get(path)]
    said = f"{name} was compiled again at call {call} ({', '.join(programs)}): "
    if not changed:
        return said + "its arguments are alike, so the mesh, a setting of jax or a traced closure has changed"
    path = changed[0]
    more = f" (and {len(changed) - 1} more leaves)" if len(changed) > 1 else ""
    return said + f"{path} was {before.get(path, 'not there')}, now {now.get(path, 'not there')}{more}"
