"""Routes: one request a connection, every answer and error as JSON or as a stream of it."""

from __future__ import annotations

import contextlib
import json
import socket
import traceback
from http.server import BaseHTTPRequestHandler
from io import BufferedReader
from typing import Any, NamedTuple
from urllib.parse import unquote

from experiments.serve import ask, door, fields, shapes
from experiments.serve.desk import Desk
from experiments.serve.fields import Refused
from experiments.serve.follow import Gone, follow
from experiments.serve.listen import Server

MODELS = "/v1/models"
# what every answer says: nothing is kept, framed or guessed about
HEADERS = {"Connection": "close", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY"}


class Service(NamedTuple):
    """What requests are answered with. name: of the model; about: what /v1/models says of it; most: the largest max_tokens;
    page: the chat page and the headers that go with it."""

    loaded: Any
    desk: Desk
    door: door.Door
    name: str
    about: dict[str, Any]
    most: int
    page: tuple[bytes, dict[str, str]]


class Handler(BaseHTTPRequestHandler):
    """One request; the connection is closed behind it."""

    protocol_version, server_version, sys_version = "HTTP/1.1", "jaxllm", ""
    server: Server

    def setup(self) -> None:
        super().setup()
        self.begun = False
        self.rfile = BufferedReader(door.Slow(self.connection, door.READ_SECONDS))

    def log_message(self, format: str, *args: Any) -> None:
        return

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses: malformed requests, other methods."""
        self.refuse(Refused(405 if code == 501 else code, message or "the request cannot be read"))

    def do_GET(self) -> None:
        self.answer({"/": self.page, "/health": self.health, MODELS: self.models}, MODELS)

    def do_POST(self) -> None:
        self.answer({"/v1/chat/completions": lambda: self.complete(True), "/v1/completions": lambda: self.complete(False)})

    def answer(self, routes: dict[str, Any], below: str = "") -> None:
        self.close_connection = True
        path = unquote(self.path.partition("?")[0])
        service = self.server.service
        try:
            door.check_origin(service.door, self.headers)
            if path not in ("/", "/health"):
                door.check_token(service.door, self.headers)
            if path in routes:
                routes[path]()
            elif below and path.startswith(f"{below}/"):
                self.one_model(path.removeprefix(f"{below}/"))
            else:
                raise Refused(404, "there is nothing here: /v1/chat/completions, /v1/completions, /v1/models, /health, /")
        except Refused as refused:
            self.refuse(refused)
        except OSError:  # the client left
            return
        except RecursionError:  # JSON that can be read may still be too deep to be told of
            self.refuse(Refused(400, "the body is nested too deeply"))
        except Exception:
            traceback.print_exc()
            self.refuse(Refused(500, "the server failed on this request: its log says how"))

    def page(self) -> None:
        content, headers = self.server.service.page
        self.send(200, content, {"Content-Type": "text/html; charset=utf-8", **headers})

    def health(self) -> None:
        desk = self.server.service.desk
        state = "closing" if desk.closing.is_set() else "ok"
        self.send_json({"status": state, "active": len(desk.seated), "waiting": len(desk.waiting)}, 200 if state == "ok" else 503)

    def models(self) -> None:
        self.send_json({"object": "list", "data": [self.server.service.about]})

    def one_model(self, name: str) -> None:
        if name != self.server.service.name:
            raise Refused(404, f"model {name[:80]!r} is not served here", param="model", code="model_not_found")
        self.send_json(self.server.service.about)

    def complete(self, is_chat: bool) -> None:
        service = self.server.service
        body = fields.parse(door.read_body(self.headers, self.rfile))
        asked = ask.read(body, service.loaded, is_chat=is_chat, name=service.name, most=service.most)
        tokenizer = service.loaded.tokenizer
        here = lambda: door.here(self.connection)  # noqa: E731
        with contextlib.suppress(Gone), follow(service.desk, asked, tokenizer, here) as pieces:
            if asked.stream:
                self.stream(shapes.chunks(asked, service.name, pieces, tokenizer))
            else:
                self.send_json(shapes.whole(asked, service.name, pieces, tokenizer))

    def stream(self, chunks: Any) -> None:
        """Events as they come; an error in the middle is an event too."""
        self.begin(200, {"Content-Type": "text/event-stream; charset=utf-8"})
        try:
            for chunk in chunks:
                self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        except Refused as refused:
            self.wfile.write(b"data: " + json.dumps(shapes.error(refused)).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")

    def begin(self, status: int, headers: dict[str, str]) -> None:
        self.begun = True
        self.connection.settimeout(door.WRITE_SECONDS)
        self.send_response(status)
        for name, value in {**HEADERS, **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.begin(status, {"Content-Length": str(len(content)), **headers})
        self.wfile.write(content)

    def send_json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def refuse(self, refused: Refused) -> None:
        """The error, and then what the client may still be sending: closing earlier would take the answer away from it."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            if not self.begun:
                self.send_json(shapes.error(refused), refused.status, refused.headers)
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(0.5)
            for _ in range(64):
                if not self.connection.recv(2**16):
                    break
