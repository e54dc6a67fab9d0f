"""A server in this process, on a free port of the loopback, over the tiny run."""

import http.client
import json
from typing import Any, NamedTuple

import pytest

from experiments import chat as chatting
from experiments.serve import __main__ as serving
from experiments.serve.listen import listen
from experiments.serve.server import Handler
from tests.models.tiny import weights


class Running(NamedTuple):
    """A server under test: its port, what it serves, its desk."""

    port: int
    loaded: Any
    desk: Any
    name: str
    listening: Any

    def ask(self, path="/v1/chat/completions", body=None, method=None, **headers):
        """(status, headers, body as text) of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = {} if body is None else {"Content-Type": "application/json"}
        given = {**kind, **{name.replace("_", "-"): value for name, value in headers.items()}}
        connection.request(method or ("GET" if body is None else "POST"), path, content, given)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, answer.headers, text

    def chat(self, content="say cat", **more):
        body = {"model": self.name, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 8, **more}
        status, _, text = self.ask(body=body)
        assert status == 200, text
        return json.loads(text)


def run_server(loaded, *, token="", slots=3, queue=40, max_tokens=64):
    """(a running server, how to stop it)."""
    listening = listen("127.0.0.1", 0, token, Handler)
    options = {"host": "127.0.0.1", "token": token, "slots": slots, "queue": queue, "max_tokens": max_tokens}
    desk, threads = serving.start(listening, loaded, **options)
    running = Running(listening.server_address[1], loaded, desk, listening.service.name, listening)
    return running, lambda: serving.stop(listening, desk, threads)


@pytest.fixture(scope="session")
def server(base):
    """The tiny run's SFT stage, with weights whose answers differ."""
    loaded = chatting.open_run(str(base), "sft")
    running, stop = run_server(loaded._replace(params={"policy": weights(loaded.model.specs, seed=4)}))
    yield running
    stop()
