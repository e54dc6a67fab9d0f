"""The listening socket: one thread a connection, a bounded number of them."""

from __future__ import annotations

import errno
import socket
import socketserver
import sys
import threading
import traceback
from http.server import ThreadingHTTPServer
from typing import Any

from experiments.serve import door
from jaxllm.core.types import UserError

CONNECTIONS = 128  # at once


class Server(ThreadingHTTPServer):
    """Listens at once, so that a port that is taken is known before a model is loaded; answers from `service` when it serves."""

    daemon_threads, block_on_close, request_queue_size = True, False, CONNECTIONS
    service: Any = None

    def __init__(self, host: str, port: int, handler: type):
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self.address_family, self.places = info[0], threading.BoundedSemaphore(CONNECTIONS)
        super().__init__(info[4][:2], handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's looks the host's name up, which may take seconds

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self.places.acquire(blocking=False):
            return self.shutdown_request(request)
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # the machine has no thread left
            self.places.release()
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # that is a client who left
            traceback.print_exc()


def listen(host: str, port: int, token: str, handler: type) -> Server:
    """A server on host and port. UserError: another host without a token, no such host, a port that is taken or not allowed."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port={port}: ports are 0 (any that is free) to 65535")
    try:
        if not door.is_loopback(host) and not token:
            raise UserError(
                f"--host={host} lets other machines in: add --token=auto, a token that they must know, or use --host=127.0.0.1"
            )
        return Server(host, port, handler)
    except socket.gaierror as error:
        raise UserError(f"--host={host}: no such address ({error.strerror}): use 127.0.0.1") from None
    except OSError as error:
        reasons = {errno.EADDRINUSE: "is in use", errno.EACCES: "is not allowed to this user"}
        reason = reasons.get(error.errno, f"cannot be used ({error.strerror})")
        free = next_free(host, port + 1 if error.errno == errno.EADDRINUSE else 8000)
        raise UserError(f"port {port} of {host} {reason}: use --port={free}") from None


def next_free(host: str, port: int) -> int:
    """The first free port from `port` on, 0 (any) when none of the next hundred is."""
    info = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    for candidate in range(port, min(port + 100, 65536)):
        with socket.socket(info[0], socket.SOCK_STREAM) as probe:
            try:
                probe.bind((info[4][0], candidate))
                return candidate
            except OSError:
                continue
    return 0
