"""An OpenAI-compatible endpoint and a chat page over any stage's checkpoint.

    python -m experiments.serve --run=runs/quickstart --stage=ppo
    http://127.0.0.1:8000  (loopback only)

Another host than this machine's own needs --token=SECRET, or --token=auto for one that is made and printed. See docs/serving.md.
"""

from __future__ import annotations

import signal
import threading
from typing import Any

from experiments import chat as chatting
from experiments.serve import door, server, worker
from experiments.serve.desk import Desk, close
from experiments.serve.listen import Server, listen
from experiments.serve.page import about, load_page, model_name
from jaxllm import launch
from jaxllm.core.types import UserError

FLAGS = {
    "run": "latest", "stage": "", "host": "127.0.0.1", "port": 8000, "token": "", "slots": 8, "queue": 64, "max_tokens": 1024,
}  # fmt: skip


def start(
    listening: Server, loaded: Any, *, host: str, token: str, slots: int, queue: int, max_tokens: int
) -> tuple[Desk, list[threading.Thread]]:
    """The worker and the listener on threads of their own, when the first program is compiled: (the desk, the threads)."""
    desk, ready = Desk(queue), threading.Event()
    name = model_name(loaded)
    listening.service = server.Service(
        loaded, desk, door.door(host, token), name, about(loaded, name, max_tokens), max_tokens, load_page()
    )
    threads = [
        threading.Thread(target=worker.work, args=(desk, loaded, slots, ready), name="worker", daemon=True),
        threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.1}, name="listener", daemon=True),
    ]
    threads[0].start()
    while not ready.wait(0.1):
        if not threads[0].is_alive():
            raise UserError("the model's first step failed: the log above says how")
    threads[1].start()
    return desk, threads


def stop(listening: Server, desk: Desk, threads: list[threading.Thread]) -> None:
    """No more requests; those in work are told; the device is at rest when this returns, or after 10 seconds."""
    close(desk)
    listening.shutdown()
    listening.server_close()
    for thread in threads:
        thread.join(10)


def main(
    run: str = "latest", stage: str = "", host: str = "127.0.0.1", port: int = 8000, token: str = "", slots: int = 8,
    queue: int = 64, max_tokens: int = 1024,
) -> None:  # fmt: skip
    for name, value in (("slots", slots), ("queue", queue), ("max_tokens", max_tokens)):
        if value < 1:
            raise UserError(f"--{name}={value}: must be at least 1")
    token = door.make_token(token)
    listening = listen(host, port, token, server.Handler)
    stopping = threading.Event()
    previous = {s: signal.signal(s, lambda *_: stopping.set()) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        loaded = chatting.open_run(run, stage)
        desk, threads = start(
            listening, loaded, host=host, token=token, slots=slots, queue=queue, max_tokens=max_tokens
        )
        print(f"{chatting.about(loaded)} as model {listening.service.name!r}")
        print(door.address(host, listening.server_address[1], token), flush=True)
        while not stopping.wait(0.5):
            if not threads[0].is_alive():
                raise RuntimeError("the worker has ended")
        stop(listening, desk, threads)
        print("stopped: nothing is left to save")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    launch.tool(main, "serve", FLAGS)
