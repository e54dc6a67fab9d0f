"""Several processes as one: what they decide, read and wait for together. With one process everything here is free.

All of it goes over the coordination service of jax.distributed, not over the devices: gloo's collectives on CPU give up after
30 s, and these wait for as long as a peer lives. All processes must call these functions in the same order.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxllm.core.types import UserError

HOURS = 24 * 3600.0  # a peer that died is reported by the heartbeat, long before
LOST = ("gloo", "nccl", "coordination service", "coordination_service", "heartbeat", "connection reset", "connection closed")

_numbers = itertools.count()


def alone() -> bool:
    """True with one process."""
    return jax.process_count() == 1


def barrier(seconds: float = HOURS) -> None:
    """Wait until every process is here."""
    if not alone():
        _client().wait_at_barrier(_name("barrier"), timeout_in_ms=int(1000 * seconds))


def first_only(work: Callable[[], Any]) -> None:
    """Process 0 does the work, which writes files that all can see afterwards; the others wait. It may raise UserError."""

    def done() -> None:
        work()

    from_first(done)


def from_first(make: Callable[[], Any]) -> Any:
    """make() of process 0 on every process, as JSON holds it; a UserError or OSError there is raised on all."""
    if alone():
        return make()
    key, client = _name("value"), _client()
    if jax.process_index() == 0:
        try:
            said: dict[str, Any] = {"value": make()}
        except UserError as error:
            said = {"error": str(error), "code": error.code}
        except OSError as error:
            said = {"error": error.strerror or str(error), "errno": error.errno}
        client.key_value_set(key, json.dumps(said))
    else:
        said = json.loads(client.blocking_key_value_get(key, int(1000 * HOURS)))
    if "errno" in said:
        raise OSError(said["errno"], said["error"])
    if "error" in said:
        error = UserError(said["error"])
        error.code = said["code"]
        raise error
    return said["value"]


def check_same(values: Mapping[str, Any]) -> None:
    """UserError that names the first value which is not that of process 0: another config, other data, another tokenizer."""
    if alone():
        return
    own = {name: json.dumps(value, sort_keys=True, default=str) for name, value in values.items()}
    first = from_first(lambda: own)
    differ = [name for name in sorted(first.keys() | own.keys()) if first.get(name) != own.get(name)]
    key, client = _name("same"), _client()
    client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(differ))
    found = [json.loads(client.blocking_key_value_get(f"{key}/{i}", int(1000 * HOURS))) for i in range(jax.process_count())]
    if bad := next((i for i, names in enumerate(found) if names), None):
        name = found[bad][0]
        here = f": here {own.get(name)}, there {first.get(name)}" if bad == jax.process_index() else ""
        raise UserError(
            f"process {bad} and process 0 do not run the same: {name} differs{here}. "
            "Start all with the same command, data and code"
        )


def on_host(tree: Any) -> Any:
    """The arrays of a tree as numpy, whole on every process."""
    if alone():
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    def one(x: Any) -> Any:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(one, tree)


def together(fn: Callable) -> Callable:
    """A jitted function that all processes enter at once: with new shapes they compile, wait for one another, and only then run.

    One that finds its program in the compile cache would otherwise wait in its first collective for those that do not.
    """
    if alone():
        return fn
    seen: set[Any] = set()

    @functools.wraps(fn)
    def call(*args: Any) -> Any:
        shapes = jax.tree.structure(args), tuple((np.shape(x), str(getattr(x, "dtype", type(x)))) for x in jax.tree.leaves(args))
        if shapes not in seen:
            seen.add(shapes)
            fn.lower(*args).compile()
            barrier()
        return fn(*args)

    call.lower = fn.lower
    return call


def make_meet(depth: int) -> Callable[[int, Mapping[str, Any]], dict[str, Any]]:
    """meet(step, wishes) -> what every process does before step `step`: the wishes of any, depth + 1 steps after they were made.

    depth: how many steps the host runs ahead of the devices. A process at boundary s that wishes something writes it down for
    s + depth + 1 before it starts step s; another that reaches s + depth + 1 has seen step s finished, which it could not
    without the first, and so finds the note. Every boundary costs one question to the coordinator. A single process gets its
    wishes at once.
    """
    if alone():
        return lambda step, wishes: dict(wishes)
    client, prefix, number = _client(), _name("meet"), 0
    due: dict[int, dict[str, Any]] = {}

    def read(step: int) -> None:
        nonlocal number
        while (note := _try_get(client, f"{prefix}/{number}")) is not None:
            at, wishes = json.loads(note)
            if at < step:
                raise RuntimeError(f"a note for step {at} was found at step {step}: the processes have parted")
            due.setdefault(at, {}).update(wishes)
            number += 1

    def meet(step: int, wishes: Mapping[str, Any]) -> dict[str, Any]:
        read(step)
        if wishes and not any(wishes.items() <= noted.items() for noted in due.values()):
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process may be quicker
                client.key_value_set(f"{prefix}/{number}", json.dumps([step + depth + 1, dict(wishes)]))
            read(step)
        return due.pop(step, {})

    return meet


def leave(code: int) -> None:
    """End this process now. Where all end, they do so together; a peer that does not come is waited for 5 s only.

    The usual way out waits for minutes, and process 0, who holds the service, takes those who wait for it down with it.
    """
    with contextlib.suppress(Exception):
        barrier(5.0)
        if jax.process_index() == 0:
            time.sleep(0.5)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def lost_peer(error: BaseException) -> bool:
    """Whether an error says that another process is gone, which a restart cures."""
    text = str(error).lower()
    return isinstance(error, jax.errors.JaxRuntimeError) and not alone() and any(word in text for word in LOST)


def _try_get(client: Any, key: str) -> str | None:
    try:
        return client.key_value_try_get(key)
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def _name(kind: str) -> str:
    return f"jaxllm/{next(_numbers)}/{kind}"


def _client() -> Any:
    # no public name: orbax takes it from here too
    from jax._src import distributed

    if distributed.global_state.client is None:
        raise UserError(
            f"there are {jax.process_count()} processes, but jax.distributed was not started: give --coordinator=auto where jax "
            "finds the others itself, or --coordinator=host:port --processes=N --process=I"
        )
    return distributed.global_state.client
