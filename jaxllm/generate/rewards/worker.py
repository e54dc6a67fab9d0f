"""The process in which a user's reward function runs: it may hang, crash or print, and training goes on.

Started by `combine` as `python worker.py <file or module> <function>`, which ends it when it does not answer. One JSON object
a line in (a row), one out: {"value"} or {"error"}.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from typing import Any


def main(source: str, name: str) -> None:
    """Load the function, say so, and answer until the input ends."""
    # replies have a descriptor of their own: whatever the function prints goes to stderr
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(reply: dict[str, Any]) -> None:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    try:
        function = load(source, name)
    except BaseException as error:
        return say({"error": _named(error)})
    say({"value": "ready"})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            say({"value": _number(function(request["row"], **request["options"]))})
        except Exception as error:  # whatever the function raises
            say({"error": _named(error)})


def load(source: str, name: str) -> Callable[..., Any]:
    """The function `name` of a file (.py) or an importable module."""
    if not source.endswith(".py"):
        return getattr(importlib.import_module(source), name)
    sys.path.insert(0, os.path.dirname(os.path.abspath(source)))  # what stands beside the file can be imported
    spec = importlib.util.spec_from_file_location("user_reward", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def _number(value: Any) -> Any:
    """A JSON value of what the function gave: numbers of other libraries as floats, everything else as its description."""
    if value is None or isinstance(value, (str, list, tuple, dict)):
        return repr(value)[:80]
    return float(value)


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


if __name__ == "__main__":
    main(*sys.argv[1:3])
