"""The fields of a request's JSON, each checked, and the error that tells a client what is wrong with one."""

from __future__ import annotations

import json
import math
from typing import Any


class Refused(Exception):
    """A request that is answered with an error: the HTTP status and headers, and OpenAI's type, parameter and code."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(status, {})
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        self.type = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")


def parse(text: bytes) -> dict[str, Any]:
    """The object in a request's body."""
    try:
        body = json.loads(text.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {str(error)[:100]}") from None
    if not isinstance(body, dict):
        raise Refused(400, "the body must be a JSON object")
    return {name: value for name, value in body.items() if value is not None}


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def number(body: dict[str, Any], name: str, default: Any, low: float, high: float) -> Any:
    """A number of the default's kind in [low, high]."""
    value, kind = body.get(name, default), type(default)
    fits = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not fits or not low <= value <= high or not math.isfinite(value):
        what = "a whole number" if kind is int else "a number"
        raise Refused(400, f"{name} must be {what} from {low} to {high}, not {str(value)[:40]!r}", param=name)
    return kind(value)


def flag(body: dict[str, Any], name: str) -> bool:
    """True or false; false when it is not there."""
    if not isinstance(value := body.get(name, False), bool):
        raise Refused(400, f"{name} must be true or false", param=name)
    return value
