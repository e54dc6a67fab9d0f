"""What runs inside a tier: it limits itself, gives up its rights and runs one candidate. `runner` passes its text to python -c.

Nothing here is a secret: whatever is in this process, the candidate can read and change, the nonce too. Expected outputs are
not here. All it can do is to say what its outputs are.
"""

from __future__ import annotations

import builtins
import json
import os
import resource
import sys
from typing import Any

NO_NEW_PRIVS, DUMPABLE, SECCOMP = 38, 4, 22  # of prctl
# a machine's number for audits, and those of its system calls unshare, clone, clone3, setns
CALLS = {"x86_64": (0xC000003E, 272, 56, 435, 308), "aarch64": (0xC00000B7, 97, 220, 435, 268)}
NEW_USER = 0x10000000  # the flag of unshare and clone for a user namespace


def main() -> None:
    """Read the request, and fork: the parent only waits (as the first process of a namespace, its end is everybody's)."""
    plan = json.loads(sys.argv[1])
    with os.fdopen(plan["request"], "rb") as file:
        request = json.loads(file.read())
    others = _threads(os.getuid()) if plan["count_others"] else 0
    prctl = _prctl()
    if child := os.fork():
        prctl(DUMPABLE, 0)  # no debugger of the same user
        os._exit(_code(_wait(child)))
    confine(plan, prctl, others)
    del sys.argv[1:]
    candidate(request, plan["result"])


def _wait(child: int) -> int:
    """The status of a child; others, which may become ours, are reaped on the way."""
    while True:
        found, status = os.wait()
        if found == child:
            return status


def _code(status: int) -> int:
    return os.waitstatus_to_exitcode(status) % 256


def _prctl() -> Any:
    """prctl of the C library; one that does nothing where there is none."""
    if sys.platform != "linux":
        return lambda *_: 0
    import ctypes

    library, long = ctypes.CDLL(None, use_errno=True), ctypes.c_ulong
    return lambda option, value, more=0: library.prctl(option, long(value), long(more), long(0), long(0))


def _threads(uid: int) -> int:
    """How many threads a user has: RLIMIT_NPROC counts them all where nothing else shuts the process in."""
    count = 0
    for name in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        try:
            count += len(os.listdir(f"/proc/{name}/task")) if os.stat(f"/proc/{name}").st_uid == uid else 0
        except OSError:  # it ended meanwhile
            continue
    return count


# ---- giving up rights


def confine(plan: dict[str, Any], prctl: Any, others: int) -> None:
    """Limits, directory, user and no_new_privs; raises when one of them cannot be had."""
    os.chdir(plan["home"])
    os.umask(0o077)
    for name, value in plan["limits"].items():
        _limit(name, value + others * (name == "RLIMIT_NPROC"))
    if plan["uid"] is not None:
        library = os.open(os.path.dirname(os.__file__), os.O_RDONLY)
        os.setgroups([])
        os.setresgid(plan["uid"], plan["uid"], plan["uid"])
        os.setresuid(plan["uid"], plan["uid"], plan["uid"])
        _find_library(library)
    if prctl(NO_NEW_PRIVS, 1):
        raise OSError("no_new_privs was refused")
    if sys.platform == "linux" and os.uname().machine in CALLS:
        _no_namespaces(prctl, *CALLS[os.uname().machine])


def _no_namespaces(prctl: Any, machine: int, unshare: int, clone: int, clone3: int, setns: int) -> None:
    """No user namespace: in its own a program is root, mounts file systems of any size and reaches more of the kernel.

    A kernel without filters of system calls lets it through: `probes` tells.
    """
    import ctypes
    import struct

    load, equal, above, bits, end = 0x20, 0x15, 0x35, 0x45, 6  # of the filter's language; jumps count from the next line
    allow, denied, absent = 0x7FFF0000, 0x50001, 0x50026  # EPERM; ENOSYS: the C library falls back to clone
    lines = (
        (load, 0, 0, 4), (equal, 0, 9, machine),  # system calls of another kind of program
        (load, 0, 0, 0), (above, 7, 0, 0x40000000), (equal, 7, 0, clone3), (equal, 5, 0, setns),
        (equal, 1, 0, unshare), (equal, 0, 2, clone), (load, 0, 0, 16), (bits, 1, 0, NEW_USER),
        (end, 0, 0, allow), (end, 0, 0, denied), (end, 0, 0, absent),
    )  # fmt: skip
    filters = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in lines))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(lines), ctypes.addressof(filters)))
    prctl(SECCOMP, 2, ctypes.addressof(program))


def _limit(name: str, value: int) -> None:
    which = getattr(resource, name)
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(which, (value, value))
    except (ValueError, OSError):  # macOS has no limit of memory
        if sys.platform == "linux":
            raise


def _find_library(descriptor: int) -> None:
    """Where the new user may not walk to the standard library (a Python under /root), it is reached through the descriptor."""
    old = os.path.dirname(os.__file__)
    if os.access(old, os.R_OK | os.X_OK):
        return os.close(descriptor)
    new = f"/proc/self/fd/{descriptor}"
    sys.path[:] = [path.replace(old, new, 1) for path in sys.path if path.startswith(old)]
    for module in list(sys.modules.values()):
        if isinstance(getattr(module, "__path__", None), list):
            module.__path__[:] = [path.replace(old, new, 1) for path in module.__path__]
    sys.path_importer_cache.clear()


# ---- the candidate


def candidate(request: dict[str, Any], result: int) -> None:
    """Run the source as a program, or define its function and call it on every input, one frame each."""
    builtins.exit = builtins.quit = sys.exit  # -S leaves them out
    nonce = request["nonce"].encode()

    def say(frame: dict[str, Any]) -> None:
        data = nonce + json.dumps(frame).encode() + b"\n"
        while data:
            data = data[os.write(result, data) :]

    say({"ready": True})  # all that goes wrong from here on is the candidate's doing
    if request["function"] is None:
        os.close(result)
        program(request["source"])
    else:
        calls(request, say)


def program(source: str) -> None:
    """The source as __main__; it ends as a program ends."""
    scope = {"__name__": "__main__", "__builtins__": builtins}
    exec(compile(source, "program.py", "exec"), scope)  # noqa: S102 what this process is for


def calls(request: dict[str, Any], say: Any) -> None:
    """function(*input) for every input: {"i", "value"} or {"i", "error"}."""
    scope = {"__name__": "candidate", "__builtins__": builtins}
    try:
        exec(compile(request["source"], "candidate.py", "exec"), scope)  # noqa: S102 what this process is for
        function = scope[request["function"]]
    except BaseException as error:
        return say({"error": _named(error)})
    for i, given in enumerate(request["inputs"]):
        try:
            say({"i": i, "value": function(*given) if isinstance(given, list) else function(given)})
        except BaseException as error:
            say({"i": i, "error": _named(error)})
    os._exit(0)


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


if __name__ == "__main__":
    main()
