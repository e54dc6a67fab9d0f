"""How a process is shut in: bubblewrap, unshare, or limits alone; docs/security.md has what each closes, measured.

A tier is a function from the directory of a run to the command that goes before Python's.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxllm.core.types import UserError

UIDS = range(61184, 65520)  # what systemd keeps for users that exist only while a process runs
_turn = itertools.count(random.SystemRandom().randrange(len(UIDS)))
NOBODY = 65534
SCRATCH = 2**26  # bytes of bubblewrap's /tmp
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/nix/store")


class Tier(NamedTuple):
    """prefix(home) -> the words before Python's; inside: where home lies for the candidate; namespaced: whether all its
    processes end with the first; why_not() -> a reason, "" when it can be had; about: what it leaves open, "" for nothing
    that docs/security.md measures."""

    name: str
    prefix: Callable[[str], list[str]]
    inside: Callable[[str], str]
    namespaced: bool
    why_not: Callable[[], str]
    about: str


def python() -> str:
    """The interpreter itself, not a virtual environment's link to it."""
    return os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)


def new_uid() -> int | None:
    """A user for one run that owns nothing and runs nothing else, in turn: two of one moment must not share their limits or
    end each other. None when we may not choose."""
    return UIDS[next(_turn) % len(UIDS)] if os.geteuid() == 0 else None


# ---- the tiers


def _bwrap(home: str) -> list[str]:
    shown = [path for path in (*LIBRARIES, os.path.realpath(sys.base_prefix)) if os.path.exists(path)]
    shown += [] if python().startswith(os.path.realpath(sys.base_prefix)) else [os.path.dirname(python())]
    binds = [word for path in shown for word in ("--ro-bind", path, path)]
    devices = [word for path in DEVICES for word in ("--dev-bind", path, path)]
    if os.geteuid() == 0:  # the child gives these two up with its user
        user = ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        user = ["--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    size = ["--size", str(SCRATCH)] if "--size" in _help("bwrap") else []
    return [
        str(shutil.which("bwrap")), "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try",
        *user, "--die-with-parent", *binds, "--proc", "/proc", *devices, "--perms", "1777", *size, "--tmpfs", "/tmp",
        "--remount-ro", "/", "--chdir", "/tmp", "--",
    ]  # fmt: skip


def _unshare(home: str) -> list[str]:
    user = [] if os.geteuid() == 0 else ["--user", "--map-current-user"]
    spaces = ["--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--mount-proc"]
    return [str(shutil.which("unshare")), *user, *spaces, "--"]


def _without(program: str) -> Callable[[], str]:
    return lambda: "" if shutil.which(program) else f"{program} is not installed"


@functools.cache
def _help(program: str) -> str:
    done = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=20)
    return done.stdout + done.stderr


TIERS = {
    "bwrap": Tier("bwrap", _bwrap, lambda home: "/tmp", True, _without("bwrap"), ""),
    "unshare": Tier(
        "unshare", _unshare, lambda home: home, True, _without("unshare"),
        "model code can read every file that its user can (no network, no other process)",
    ),
    "rlimits": Tier(
        "rlimits", lambda home: [], lambda home: home, False, lambda: "",
        "model code runs with limits alone: it can read files, use the network and see other processes",
    ),
}  # fmt: skip


# ---- choosing one


def choose(name: str, works: Callable[[Tier], str], *, unsafe_local: bool = False) -> Tier:
    """The tier of a name; "auto" is the first of bwrap and unshare that works here. works(tier): a reason why not, or "".

    UserError: the tier is off, cannot be had, is none, or is "rlimits" without unsafe_local.
    """
    if name == "auto" and "COLAB_RELEASE_TAG" in os.environ:
        name = "off"  # a notebook's machine holds its owner's files and tokens
    if name == "off":
        raise UserError("model code is not run (tier off): choose the tier bwrap, unshare, or unsafe_local")
    if name not in ("auto", *TIERS):
        raise UserError(f"tier {name!r}: choose one of auto, {', '.join(TIERS)}, off")
    if name == "rlimits" and not unsafe_local:
        raise UserError(f"tier rlimits: {TIERS[name].about}: say unsafe_local if that is meant, or install bubblewrap")
    tried: dict[str, Any] = {}
    for tier in [TIERS[n] for n in (("bwrap", "unshare") if name == "auto" else (name,))]:
        tried[tier.name] = tier.why_not() or works(tier)
        if not tried[tier.name]:
            return tier
    reasons = "; ".join(f"{n}: {why}" for n, why in tried.items())
    raise UserError(
        f"model code cannot be shut in here ({reasons}): install bubblewrap, or say unsafe_local to run it with limits alone"
    )
