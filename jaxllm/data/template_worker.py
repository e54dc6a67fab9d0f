"""The process that renders chat templates: templates come with models from anywhere, and may loop or grow without end.

Started by `template`, which ends it when it does not answer. One JSON object a line in, one out. The template sees plain data
in jinja2's immutable sandbox: no files, no imports, no attributes that begin with an underscore.
"""

from __future__ import annotations

import datetime
import functools
import json
import sys
from collections.abc import Mapping
from typing import Any

MEMORY = 2**30  # bytes of address space
LONGEST = 1000  # characters of an error
NO_TOKENS = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "")  # of a vocabulary without them


def main() -> None:
    """Answer until the input ends."""
    _limit()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(json.loads(line))) + "\n")
        sys.stdout.flush()


def answer(request: Mapping[str, Any]) -> dict[str, str]:
    """{"text"} or {"error"}; request: template, variables, now (ISO), open and close (around {% generation %} blocks), limit."""
    import jinja2

    try:
        text = _render(request)
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {str(error.message)[:LONGEST]}"}
    except MemoryError:
        return {"error": f"took over {MEMORY >> 20} MB"}
    except Exception as error:  # whatever an operation of the template raises
        return {"error": str(error)[:LONGEST] or type(error).__name__}
    return {"text": text}


def _render(request: Mapping[str, Any]) -> str:
    now = datetime.datetime.fromisoformat(request["now"])
    context = {**NO_TOKENS, **request["variables"], "strftime_now": now.strftime}
    context["jaxllm_generation"] = lambda caller: request["open"] + caller() + request["close"]
    parts, length = [], 0
    for part in compiled(request["template"]).generate(context):
        length += len(part)
        if length > request["limit"]:
            raise ValueError(f"wrote over {request['limit']:,} characters")
        parts.append(part)
    return "".join(parts)


@functools.lru_cache(8)
def compiled(source: str) -> Any:
    """The template as transformers compiles it; a {% generation %} block is a call block here."""
    import re

    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    # a test of what is not there is an author's, writing it into the conversation is a mistake
    fail = jinja2.Undefined._fail_with_undefined_error
    unwritable = type("Unwritable", (jinja2.Undefined,), {"__str__": fail, "__slots__": ()})
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], undefined=unwritable
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    source = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1call jaxllm_generation()\2", source)
    return environment.from_string(re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endcall\2", source))


def _limit() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):  # no such limits here: the clock remains
        return


if __name__ == "__main__":
    main()
