"""The one thread that owns the device: it seats requests in rows, draws a token for all of them at once, and frees the rows."""

from __future__ import annotations

import sys
import threading
import traceback
from typing import Any

import jax
import numpy as np

from experiments.serve.desk import Desk, Told, Wanted, fail
from jaxllm.core.spec import unstack
from jaxllm.data import chat
from jaxllm.generate import slots


def work(desk: Desk, loaded: Any, count: int, ready: threading.Event | None = None) -> None:
    """Serve `count` rows at once until the desk closes. A failure of the device ends the requests in work, not the worker."""
    model, length = loaded.model, loaded.model.config.max_length
    made, params = slots.make_slots(model, count, length), unstack(loaded.params["policy"])
    stop = frozenset(chat.stop_ids(loaded.tokenizer))
    rows, held = _warm(made, params, count), {}
    if ready is not None:
        ready.set()
    while not desk.closing.is_set():
        with desk.changed:
            desk.changed.wait_for(lambda: desk.waiting or desk.seated or desk.closing.is_set())
        try:
            rows = _turn(desk, made, params, rows, held, count, length, stop)
        except Exception:  # out of memory, say: those who come later may fit
            traceback.print_exc()
            fail(desk, waiting=False)
            rows = made.empty()
            held.clear()
    fail(desk, waiting=True)


def _warm(made: slots.Slots, params: Any, count: int) -> slots.Rows:
    """The program of a step is compiled before anybody waits for it."""
    rows, _ = made.step(params, made.empty(), np.zeros(count, bool), np.bool_(False))
    return rows


def _turn(desk: Desk, made: Any, params: Any, rows: Any, held: dict, count: int, length: int, stop: frozenset[int]) -> Any:
    """Those who left give up their rows, those who wait take them, and everybody gets a token."""
    with desk.changed:
        for slot in [slot for slot, (seat, _) in desk.seated.items() if seat.gone.is_set()]:
            del desk.seated[slot]
    while (free := next((i for i in range(count) if i not in desk.seated), None)) is not None:
        with desk.changed:
            seat = desk.waiting.popleft() if desk.waiting else None
        if seat is None:
            break
        if not seat.gone.is_set():
            desk.seated[free] = (seat, 0)
            rows, found = made.place(
                params, rows, np.int32(free), _read(made, params, seat.wanted.prompt, held, length), _sampling(seat.wanted),
                np.bool_(seat.wanted.tops),
            )  # fmt: skip
            _tell(desk, {free: 0}, found, stop)
    if not desk.seated:
        return rows
    active = np.isin(np.arange(count), list(desk.seated))
    rows, found = made.step(params, rows, active, np.bool_(any(seat.wanted.tops for seat, _ in desk.seated.values())))
    _tell(desk, {slot: slot for slot in desk.seated}, found, stop)
    return rows


def _read(made: Any, params: Any, prompt: tuple[int, ...], held: dict, length: int) -> slots.Read:
    """A prompt is read once for all of its completions."""
    if prompt not in held:
        held.clear()
        size = next(b for b in slots.buckets(length) if b >= len(prompt))
        tokens = np.zeros((1, size), np.int32)
        tokens[0, : len(prompt)] = prompt
        held[prompt] = made.read(params, tokens, np.int32(len(prompt)))
    return held[prompt]


def _sampling(w: Wanted) -> slots.Sampling:
    key = jax.random.fold_in(jax.random.key(w.seed), w.row)
    return slots.sampling(key, w.temperature, w.top_k, w.top_p)


def _tell(desk: Desk, places: dict[int, int], found: slots.Next, stop: frozenset[int]) -> None:
    """Each slot's token, from its place in what was found, to who waits for it; rows that end are free."""
    found = jax.device_get(found)
    for slot, at in places.items():
        seat, told = desk.seated[slot]
        token, told = int(found.token[at]), told + 1
        tops = tuple(zip(found.top_ids[at].tolist(), found.top_logps[at].tolist(), strict=True)) if seat.wanted.tops else ()
        finish = "stop" if token in stop else "length" if told >= seat.wanted.limit else None
        if not np.isfinite(found.logps[at]):  # of weights that are not: whatever was drawn means nothing
            finish = "error"
            print("error: the model's scores are not finite numbers: serve an earlier checkpoint", file=sys.stderr, flush=True)
        seat.out.put(Told(seat.index, None if token in stop else token, float(found.logps[at]), tops, finish))
        desk.seated[slot] = (seat, told)
        if finish:
            del desk.seated[slot]
