"""One child process per contender, so that each library has its own thread pool; they run in turn."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.shape import Shape


def _serve(conn: Connection, target: str, shape: Shape) -> None:
    """Build `module:function`, send its facts, then run as often as told and send the seconds (wall, CPU)."""
    try:
        module, function = target.split(":")
        facts, run = getattr(importlib.import_module(module), function)(shape)
        conn.send(facts)
        while times := conn.recv():
            wall, cpu = time.perf_counter(), time.process_time()
            run(times)
            conn.send((time.perf_counter() - wall, time.process_time() - cpu))
    except Exception:
        conn.send(traceback.format_exc())


def _answer(conn: Connection, target: str, shape: Shape, rounds: int) -> None:
    try:
        module, function = target.split(":")
        conn.send(getattr(importlib.import_module(module), function)(shape, rounds))
    except Exception:
        conn.send(traceback.format_exc())


def ask(target: str, shape: Shape, rounds: int) -> Any:
    """What `module:function` of (shape, rounds) gives in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_answer, args=(theirs, target, shape, rounds), daemon=True)
    child.start()
    theirs.close()
    try:
        return receive(ours)
    finally:
        child.join(timeout=10)
        child.kill()


def receive(conn: Connection) -> Any:
    """What the child sent; raises RuntimeError with its traceback."""
    message = conn.recv()
    if isinstance(message, str):
        raise RuntimeError(f"a contender failed:\n{message}")
    return message


@contextlib.contextmanager
def started(targets: list[str], shape: Shape) -> Iterator[tuple[list[Connection], list[dict]]]:
    """Connections to one child per target, built one after another, and each one's facts."""
    context = multiprocessing.get_context("spawn")  # a forked child of a threaded parent may hang
    children, connections, facts = [], [], []
    try:
        for target in targets:
            ours, theirs = context.Pipe()
            child = context.Process(target=_serve, args=(theirs, target, shape), daemon=True)
            child.start()
            theirs.close()
            children.append(child)
            connections.append(ours)
            facts.append(receive(ours))
        yield connections, facts
    finally:
        for child, conn in zip(children, connections, strict=False):
            with contextlib.suppress(OSError):
                conn.send(0)
            child.join(timeout=10)
            child.kill()


def interleave(connections: list[Connection], times: int, rounds: int) -> list[list[tuple[float, float]]]:
    """(Wall, CPU) seconds per round and contender, in the order A B C A B C ..., after a round of warm-up."""
    seconds = []
    for _ in range(rounds + 1):
        row = []
        for conn in connections:
            conn.send(times)
            row.append(receive(conn))
        seconds.append(row)
    return seconds[1:]
