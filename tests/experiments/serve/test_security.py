"""Who is let in: names of other hosts, pages of other sites, no token, bodies too large or never complete, many connections."""

import contextlib
import fcntl
import resource
import socket
import threading
import time

import pytest

from experiments.serve import door, listen
from experiments.serve.fields import Refused
from experiments.serve.page import load_page
from experiments.serve.server import Handler
from jaxllm.core.types import UserError
from tests.experiments.serve.conftest import run_server

TOKEN = "a-token-of-the-tests"
JSON = "Content-Type: application/json"
POST = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n{JSON}\r\n"


@pytest.fixture(scope="module")
def locked(server):
    """The same model behind a token."""
    running, stop = run_server(server.loaded, token=TOKEN)
    yield running
    stop()


def raw(port, text, *, wait=10.0):
    """What a server says to these bytes, until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as connection:
        connection.sendall(text if isinstance(text, bytes) else text.encode())
        found = b""
        while part := connection.recv(2**16):
            found += part
        return found.decode()


def post(port, *headers, body='{"model": "x"}', host="Host: 127.0.0.1"):
    lines = ["POST /v1/chat/completions HTTP/1.1", host, JSON, f"Content-Length: {len(body)}", *headers]
    return raw(port, "\r\n".join(filter(None, lines)) + "\r\n\r\n" + body)


def status(answer):
    return int(answer.split(" ", 2)[1])


@pytest.mark.parametrize(
    "host",
    [
        "Host: evil.example", "Host: evil.example:8000", "Host: 127.0.0.1.evil.example", "Host: localhost@evil.example", "Host: ",
        "", "Host: [::1", "Host: 127.0.0.1\r\nHost: evil.example",
    ],
)  # fmt: skip
def test_a_name_that_was_pointed_here_is_refused(server, host):
    answer = post(server.port, host=host)
    assert status(answer) == 403 and '"code": "wrong_host"' in answer
    assert status(raw(server.port, f"GET / HTTP/1.1\r\n{host}\r\n\r\n" if host else "GET / HTTP/1.1\r\n\r\n")) == 403


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:9000", "LOCALHOST", "[::1]:8000"])
def test_names_of_this_machine_are_known_also_behind_a_forwarded_port(server, host):
    assert status(post(server.port, host=f"Host: {host}")) == 404  # let in; there is no model x
    assert status(post(server.port, f"Origin: http://{host}", host=f"Host: {host}")) == 404


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "file://", "http://127.0.0.1.evil.example"])
def test_other_sites_pages_are_refused(server, origin):
    answer = post(server.port, f"Origin: {origin}")
    assert status(answer) == 403 and '"code": "wrong_origin"' in answer
    assert "access-control" not in answer.lower()
    preflight = raw(server.port, f"OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: {origin}\r\n\r\n")
    assert status(preflight) == 405 and "access-control" not in preflight.lower()


def test_forms_of_other_sites_cannot_be_sent(server):
    lines = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}"
    assert status(raw(server.port, lines)) == 415


@pytest.mark.parametrize(
    "header", ["", "Authorization: Bearer wrong-wrong-wrong-wrong", f"Authorization: Basic {TOKEN}", f"Authorization: {TOKEN}",
               f"Authorization: Bearer {TOKEN}x", "Authorization: Bearer \xe9\xff", f"X-Api-Key: {TOKEN}"],
)  # fmt: skip
def test_the_token_is_asked_for(locked, header):
    answer = post(locked.port, header)
    assert status(answer) == 401 and "WWW-Authenticate: Bearer" in answer and '"type": "authentication_error"' in answer
    assert TOKEN not in answer
    assert status(raw(locked.port, f"GET /v1/models?token={TOKEN} HTTP/1.1\r\nHost: localhost\r\n\r\n")) == 401


def test_with_the_token_it_answers(locked):
    assert status(post(locked.port, f"Authorization: Bearer {TOKEN}")) == 404
    body = {"model": locked.name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    assert locked.ask(body=body, Authorization=f"Bearer {TOKEN}")[0] == 200
    # these two say nothing that is worth a token
    assert locked.ask("/health")[0] == locked.ask("/")[0] == 200


def test_the_comparison_is_in_constant_time(monkeypatch):
    from email.message import Message

    seen = []
    monkeypatch.setattr(door.hmac, "compare_digest", lambda a, b: seen.append((a, b)) or False)
    headers = Message()
    headers["Authorization"] = "Bearer x"
    with pytest.raises(Refused, match="token"):
        door.check_token(door.Door(None, TOKEN), headers)
    assert seen == [(b"x", TOKEN.encode())]


def test_a_body_that_is_too_large_is_not_read(server):
    start = time.monotonic()
    for length in (door.BODY + 1, 10**11, "9" * 400):
        lines = f"{POST}Content-Length: {length}\r\n\r\n"
        assert status(raw(server.port, lines)) == 413
    assert status(raw(server.port, lines + "x" * 300_000)) == 413
    assert time.monotonic() - start < 8


@pytest.mark.parametrize(
    "headers",
    ["", "Content-Length: -1", "Content-Length: 1e3", "Content-Length: 2\r\nContent-Length: 3", "Transfer-Encoding: chunked"],
)
def test_the_length_is_said_beforehand_and_once(server, headers):
    assert status(raw(server.port, POST + (f"{headers}\r\n" if headers else "") + "\r\n{}")) == 411


@pytest.mark.parametrize("sent", ["GET /health HT", f"{POST}X-Slow: ", ""], ids=["line", "headers", "nothing"])
def test_half_a_request_does_not_keep_its_thread(server, monkeypatch, sent):
    monkeypatch.setattr(door, "READ_SECONDS", 0.6)
    start = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(sent.encode())
        for _ in range(8 if sent else 0):  # a byte now and then does not help
            time.sleep(0.1)
            try:
                connection.sendall(b"a")
            except OSError:
                break
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(100) == b""
    assert 0.4 < time.monotonic() - start < 5
    assert server.ask("/health")[0] == 200


def test_a_body_that_does_not_arrive(server, monkeypatch):
    monkeypatch.setattr(door, "READ_SECONDS", 0.6)
    assert status(raw(server.port, f"{POST}Content-Length: 50\r\n\r\n{{")) == 408


def test_connections_are_bounded(server):
    opened = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(listen.CONNECTIONS)]
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as one_more:
            assert one_more.recv(100) == b""
    finally:
        for connection in opened:
            connection.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            assert server.ask("/health")[0] == 200
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError("no thread was given back")


@pytest.mark.parametrize("sent", ["\r\n\r\n", "nonsense\r\n\r\n", "GET / HTTP/9.9\r\n\r\n", f"GET /{'a' * 70_000} HTTP/1.1"])
def test_malformed_requests_are_answered_or_closed(server, sent):
    answer = raw(server.port, sent)
    assert not answer or '{"error": {' in answer and "Traceback" not in answer
    assert server.ask("/health")[0] == 200


def test_the_page_runs_nothing_but_its_own_script():
    content, headers = load_page()
    policy = headers["Content-Security-Policy"]
    assert "unsafe" not in policy
    for part in ("default-src 'none'", "script-src 'sha256-", "connect-src 'self'", "frame-ancestors 'none'"):
        assert part in policy
    text = content.decode()
    assert "http://" not in text and "https://" not in text and "src=" not in text and 'href="' not in text
    for markup in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", " onclick=", " onload="):
        assert markup not in text


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])  # noqa: S104
def test_another_host_needs_a_token(host):
    with pytest.raises(UserError, match="lets other machines in: add --token=auto"):
        listen.listen(host, 0, "", Handler)
    listen.listen("127.0.0.1", 0, "", Handler).server_close()


def test_a_token_may_stand_in_the_environment(monkeypatch):
    monkeypatch.setenv(door.TOKEN, TOKEN)
    assert door.make_token("") == TOKEN and door.make_token("auto") != TOKEN
    monkeypatch.setenv(door.TOKEN, "short")
    with pytest.raises(UserError, match="JAXLLM_TOKEN: use 16"):
        door.make_token("")


def test_a_thread_that_cannot_start_gives_its_place_back(monkeypatch):
    listening = listen.listen("127.0.0.1", 0, "", Handler)
    monkeypatch.setattr(listening, "places", threading.BoundedSemaphore(1))
    monkeypatch.setattr(listen.threading.Thread, "start", lambda self: (_ for _ in ()).throw(RuntimeError("no thread")))
    with socket.create_connection(listening.server_address[:2], timeout=5) as connection:
        listening.handle_request()
        assert connection.recv(10) == b"" and listening.places.acquire(blocking=False)
    listening.server_close()


def test_a_client_is_seen_under_any_descriptor():
    """Beyond 1023 select() knows none: a server with many files open would take every client for gone."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(4096, (soft := resource.getrlimit(resource.RLIMIT_NOFILE))[0]), soft[1]))
    ours, theirs = socket.socketpair()
    high = socket.socket(fileno=fcntl.fcntl(ours.fileno(), fcntl.F_DUPFD, 1500))
    with ours, high:
        assert door.here(high)
        theirs.close()
        assert not door.here(high)


def test_tokens():
    first, second = door.make_token("auto"), door.make_token("auto")
    assert first != second and len(first) >= 32
    assert door.make_token("") == "" and door.make_token(TOKEN) == TOKEN
    for weak in ("short", "with a space in it, long enough", "é" * 20):
        with pytest.raises(UserError, match="--token=auto"):
            door.make_token(weak)
    assert door.address("127.0.0.1", 8000, "") == "http://127.0.0.1:8000  (loopback only)"
    assert door.address("::1", 80, first).startswith(f"http://[::1]:80/#token={first}  (loopback only)")


def test_a_port_that_is_in_use_is_said_with_one_that_is_free(server):
    with pytest.raises(UserError) as error:
        listen.listen("127.0.0.1", server.port, "", Handler)
    said = str(error.value)
    free = int(said.rsplit("--port=", 1)[1])
    assert said == f"port {server.port} of 127.0.0.1 is in use: use --port={free}" and free != server.port
    suggested = listen.listen("127.0.0.1", free, "", Handler)  # the fix works
    assert suggested.server_address[1] == free
    suggested.server_close()
    with pytest.raises(UserError, match="ports are 0"):
        listen.listen("127.0.0.1", 70_000, "", Handler)
    with pytest.raises(UserError, match="no such address"):
        listen.listen("no-such-host.invalid", 0, TOKEN, Handler)
