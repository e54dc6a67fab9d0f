"""Who may come in: the host that a browser believes to talk to, the page that asks, the token, the size of a body."""

from __future__ import annotations

import hmac
import io
import ipaddress
import os
import secrets
import selectors
import socket
import time
from email.message import Message
from typing import NamedTuple
from urllib.parse import urlsplit

from experiments.serve.fields import Refused
from jaxllm.core.types import UserError

TOKEN = "JAXLLM_TOKEN"  # where other users of the machine do not see it, as they see a command line
BODY = 2**20  # bytes of a request's body
READ_SECONDS = 15.0  # for a whole request to arrive, however slowly it is sent
WRITE_SECONDS = 30.0  # for a piece of an answer to be taken


class Door(NamedTuple):
    """hosts: the names by which a browser may know this server (None: any, where a token is asked for); token: "" for none."""

    hosts: frozenset[str] | None
    token: str


class Slow(io.RawIOBase):
    """Reads a socket until a moment, whatever the pace: one byte now and then does not keep a thread."""

    def __init__(self, connection: socket.socket, seconds: float):
        self.connection, self.until = connection, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        if (left := self.until - time.monotonic()) <= 0:
            raise TimeoutError
        self.connection.settimeout(left)
        return self.connection.recv_into(buffer)


def door(host: str, token: str) -> Door:
    """That of a server bound to `host`."""
    known = frozenset({"127.0.0.1", "localhost", "::1", host.lower()})
    return Door(known if is_loopback(host) else None, token)


def make_token(given: str) -> str:
    """The token of the command line or the environment, a fresh one for `auto`. UserError on one that is guessed too easily."""
    given = given or os.environ.get(TOKEN, "")
    if given == "auto":
        return secrets.token_urlsafe(24)
    if given and (len(given) < 16 or not given.isascii() or not given.isprintable() or " " in given):
        raise UserError(f"--token or {TOKEN}: use 16 or more ASCII characters without spaces, or --token=auto")
    return given


def address(host: str, port: int, token: str) -> str:
    """The line that says where the server is. A token stands behind #, which browsers do not send."""
    name = f"[{host}]" if ":" in host else host
    reach = "loopback only" if is_loopback(host) else "other machines too: anyone with the token"
    secret = f"/#token={token}" if token else ""
    return f"http://{name}:{port}{secret}  ({reach})"


def is_loopback(host: str) -> bool:
    """Whether every address of a host name is this machine's own; UserError's reason is the caller's to give (OSError)."""
    found = {info[4][0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)


def check_origin(door: Door, headers: Message) -> None:
    """Refuses requests that another site's page makes: under a name that was pointed here (DNS rebinding), or across origins."""
    hosts = headers.get_all("Host") or []
    try:
        name = urlsplit(f"//{hosts[0].strip()}")
        known = len(hosts) == 1 and bool(name.hostname) and (door.hosts is None or name.hostname in door.hosts)
    except (ValueError, IndexError):  # a malformed name, or none
        known = False
    if not known:
        raise Refused(403, "the Host header names another server: use the address that the server printed", code="wrong_host")
    for origin in headers.get_all("Origin") or []:
        if origin.lower() not in (f"http://{name.netloc.lower()}", f"https://{name.netloc.lower()}"):
            raise Refused(403, "requests from other sites' pages are not answered", code="wrong_origin")


def check_token(door: Door, headers: Message) -> None:
    """Refuses requests without the token, in constant time."""
    if not door.token:
        return
    scheme, _, given = headers.get("Authorization", "").partition(" ")
    same = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), door.token.encode())
    if not same or scheme.lower() != "bearer":
        raise Refused(401, "give the server's token: Authorization: Bearer TOKEN", code="invalid_api_key")


def read_body(headers: Message, file: io.BufferedIOBase) -> bytes:
    """A JSON body of at most BODY bytes, whose length is said beforehand."""
    if headers.get_content_type() != "application/json":
        raise Refused(415, "send JSON: Content-Type: application/json")
    lengths = headers.get_all("Content-Length") or []
    if headers.get("Transfer-Encoding") or len(lengths) != 1 or not (lengths[0].isascii() and lengths[0].isdigit()):
        raise Refused(411, "send the body with one Content-Length")
    if len(lengths[0]) > 12 or int(lengths[0]) > BODY:
        raise Refused(413, f"the body has {lengths[0][:12]} bytes, at most {BODY} are read")
    try:
        body = file.read(int(lengths[0]))
    except TimeoutError:
        raise Refused(408, f"the request took more than {READ_SECONDS:g} seconds to arrive") from None
    if len(body) < int(lengths[0]):
        raise Refused(400, "the body ended early")
    return body


def here(connection: socket.socket) -> bool:
    """Whether the other side still listens: it has not closed the connection."""
    try:
        with selectors.DefaultSelector() as selector:  # select alone knows no descriptor above 1023
            selector.register(connection, selectors.EVENT_READ)
            return not selector.select(0) or bool(connection.recv(1, socket.MSG_PEEK))
    except (OSError, ValueError):
        return False
