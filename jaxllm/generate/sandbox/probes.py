"""What a tier leaves open on this machine, tried: each probe is a program that says whether it got through."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxllm.generate.sandbox import runner, tiers

DYING = 3.0  # seconds that killed processes may take to be gone
_HEAD = "import ctypes, os, resource, socket, time\n"
# the body of `def probe(given)`: true when it got through; an exception or false: closed
PROBES = {
    "read a file that only its user may read": "return given['word'] in open(given['secret']).read()",
    "read files that everybody may read": "return bool(open('/etc/passwd').read())",
    "read the environment of the training process": "return bool(open('/proc/%d/environ' % given['pid'], 'rb').read())",
    "see the training process": """
    try: os.kill(given['pid'], 0)
    except PermissionError: pass
    return True""",
    "send it a signal": "os.kill(given['pid'], 0); return True",
    "connect to a port of this machine": "socket.create_connection(('127.0.0.1', given['port']), 2); return True",
    "send to the internet": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'', ('192.0.2.1', 9)); return True",
    "write outside its directory": "open(given['outside'], 'w').write('x'); return os.path.exists(given['outside'])",
    "leave a process behind": """
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            ctypes.CDLL(None).prctl(15, given['word'][:15].encode(), 0, 0, 0)
            os.closerange(0, 64); time.sleep(20)
        os._exit(0)
    time.sleep(0.2)
    return 'left'""",
    "run as root": "return os.getuid() == 0",
    "gain rights by a setuid program": "return 'NoNewPrivs:\\t1' not in open('/proc/self/status').read()",
    "open a user namespace, where it is root": "return ctypes.CDLL(None).unshare(0x10000000) == 0",
    "have more processes than its limit": """
    for n in range(given['processes'] + 2):
        if os.fork() == 0: time.sleep(2); os._exit(0)
    return True""",
    "have more memory than its limit": "return bool(bytearray(given['memory']))",
    "write a longer file than its limit": "return open('big', 'wb', 0).write(bytes(given['file'] + 1)) > given['file']",
    "leave a core file": "return resource.getrlimit(resource.RLIMIT_CORE)[1] != 0",
}


def measure(tier: tiers.Tier, limits: runner.Limits) -> dict[str, bool]:
    """{what a program tries: whether it got through} in a tier."""
    made = runner.of(tier, limits)
    return {name: _open(made, body, limits) for name, body in PROBES.items()}


def _open(made: runner.CodeRunner, body: str, limits: runner.Limits) -> bool:
    with _bait() as given:
        given |= {"processes": limits.processes, "memory": limits.memory, "file": limits.file}
        outcome = made.call(f"{_HEAD}def probe(given):\n    {body.strip()}", "probe", [[given]])
        value = outcome.values[0][0] if outcome.values else None
        if value == "left":
            until = time.monotonic() + DYING
            while (left := _left(given["word"])) and time.monotonic() < until:
                time.sleep(0.05)
            return left
        return Path(given["outside"]).exists() if "outside" in body else bool(value)


def _left(word: str) -> bool:
    """Whether a process that the probe named so still runs; a dead one that nobody has asked for does not."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if f"({word[:15]}) " in (text := path.read_text()) and f"({word[:15]}) Z" not in text:
                return True
    return False


@contextlib.contextmanager
def _bait() -> Iterator[dict[str, Any]]:
    """What a probe is after: a private file, a port, our process, a place to write."""
    word = uuid.uuid4().hex
    with tempfile.TemporaryDirectory() as directory, socket.socket() as listener:
        os.chmod(directory, 0o755)
        secret, outside = Path(directory) / "secret", Path(directory) / "open" / "written"
        secret.write_text(word)
        secret.chmod(0o600)
        outside.parent.mkdir()
        outside.parent.chmod(0o777)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        yield {"word": word, "secret": str(secret), "outside": str(outside), "port": port, "pid": os.getpid()}


def table(columns: Mapping[str, Mapping[str, bool]]) -> str:
    """A Markdown table, a column for each tier: closed, or **open**."""
    lines = ["| a program tries to | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name in PROBES:
        cells = ("**open**" if found[name] else "closed" for found in columns.values())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
