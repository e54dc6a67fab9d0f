"""A request's JSON as a checked record, or one line that says which parameter is wrong, and why."""

from __future__ import annotations

import difflib
import secrets
from typing import Any, NamedTuple

from experiments.serve import prompts
from experiments.serve.fields import Refused, flag, number
from jaxllm.generate.slots import TOPS

BOTH = ("model", "stream", "stream_options", "n", "temperature", "top_p", "top_k", "seed", "stop", "max_tokens", "logprobs")
CHAT = (*BOTH, "messages", "max_completion_tokens", "top_logprobs")
TEXT = (*BOTH, "prompt")
IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "verbosity",
)  # fmt: skip
# what is not offered, and the values with which it changes nothing
NEUTRAL: dict[str, tuple] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "best_of": (1,), "suffix": ("",), "echo": (False,),
    "tools": ([],), "tool_choice": ("none", "auto"), "response_format": ({"type": "text"},), "modalities": (["text"],),
}  # fmt: skip
LONG = "context_length_exceeded"
TOGETHER = 16  # completions of one request


class Asked(NamedTuple):
    """A checked request. prompts: token ids; tops: how many alternatives of each token are told (None: no log-probabilities)."""

    prompts: list[tuple[int, ...]]
    chat: bool
    n: int
    limit: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stops: tuple[str, ...]
    tops: int | None
    stream: bool
    usage: bool


def read(body: dict[str, Any], loaded: Any, *, is_chat: bool, name: str, most: int) -> Asked:
    """The record of a request; `most`: the largest max_tokens. Refused names the parameter."""
    _known(body, CHAT if is_chat else TEXT)
    if "model" not in body:
        raise Refused(400, f"give a model: {name!r} is served here", param="model", code="missing_required_parameter")
    if body["model"] != name:
        raise Refused(404, f"model {str(body['model'])[:80]!r} is not served here: use {name!r}", param="model",
                      code="model_not_found")  # fmt: skip
    n = number(body, "n", 1, 1, TOGETHER)
    given = [] if is_chat else prompts.given(body)
    if n * len(given) > TOGETHER:
        raise Refused(400, f"{len(given)} prompts of n={n}: ask for at most {TOGETHER} completions at a time", param="n")
    rows = [prompts.messages(body, loaded)] if is_chat else prompts.prompts(given, loaded)
    options = body.get("stream_options", {})
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise Refused(400, 'stream_options must be {"include_usage": true} or nothing', param="stream_options")
    return Asked(
        rows, is_chat, n, _limit(body, rows, loaded.model.config.max_length, most, is_chat),
        number(body, "temperature", 1.0, 0, 2), number(body, "top_k", 0, 0, 2**31 - 1), number(body, "top_p", 1.0, 0, 1),
        number(body, "seed", secrets.randbits(31), -(2**63), 2**63 - 1) % 2**32, _stops(body),
        _tops(body, is_chat), flag(body, "stream"), flag(options, "include_usage"),
    )  # fmt: skip


def _known(body: dict[str, Any], names: tuple[str, ...]) -> None:
    for name, value in body.items():
        if name in names or name in IGNORED or (name in NEUTRAL and value in NEUTRAL[name]):
            continue
        if name in NEUTRAL:
            raise Refused(400, f"{name} is not offered here: leave it out", param=name, code="unsupported_parameter")
        near = difflib.get_close_matches(name, names, 1)
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise Refused(400, f"unknown parameter {name[:80]!r}{hint}", param=name[:80], code="unknown_parameter")


def _stops(body: dict[str, Any]) -> tuple[str, ...]:
    given = body.get("stop", [])
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or len(stops) > 8 or not all(isinstance(s, str) and 0 < len(s) <= 200 for s in stops):
        raise Refused(400, "stop must be a text or at most 8 of them, each of 1 to 200 characters", param="stop")
    return tuple(stops)


def _tops(body: dict[str, Any], is_chat: bool) -> int | None:
    if not is_chat:
        return number(body, "logprobs", 0, 0, 5) if "logprobs" in body else None
    if not flag(body, "logprobs"):
        if "top_logprobs" in body:
            raise Refused(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        return None
    return number(body, "top_logprobs", 0, 0, TOPS)


def _limit(body: dict[str, Any], rows: list[tuple[int, ...]], context: int, most: int, is_chat: bool) -> int:
    name = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    longest = max(map(len, rows))
    room = context - longest
    if room < 1:
        message = f"the prompt has {longest} tokens, the model's context {context}: shorten it"
        raise Refused(400, message, param="messages" if is_chat else "prompt", code=LONG)
    limit = number(body, name, min(most if is_chat else 16, most, room), 1, most)
    if limit > room:
        message = f"the prompt has {longest} tokens and {name} is {limit}, the model's context {context}: ask for {room} or fewer"
        raise Refused(400, message, param=name, code=LONG)
    return limit
