"""What the server says of its model, and the chat page with the headers that keep it to itself."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from pathlib import Path
from typing import Any

from experiments import chat as chatting

PAGE = Path(__file__).with_name("page.html")


def model_name(loaded: Any) -> str:
    """The name of a checkpoint in requests: its run directory's, behind that of the run whose stage it is, and its step."""
    where = loaded.workdir.resolve()
    stage = loaded.meta["experiment"]
    name = f"{where.parent.name}-{where.name}" if where.name == stage else where.name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{name}-{loaded.step}").strip("-")


def about(loaded: Any, name: str, most: int) -> dict[str, Any]:
    """An object of /v1/models; what OpenAI's has not, the page shows."""
    loss = chatting.eval_loss(loaded)
    loss = loss if loss is not None and math.isfinite(loss) else None  # JSON has no nan
    return {
        "id": name, "object": "model", "created": 0, "owned_by": "jaxllm", "checkpoint": str(loaded.workdir),
        "step": loaded.step, "stage": loaded.meta["experiment"], "base": chatting.is_base(loaded), "eval_loss": loss,
        "context": loaded.model.config.max_length, "max_tokens": most, "turns": loaded.meta.get("turns", 1),
    }  # fmt: skip


def load_page() -> tuple[bytes, dict[str, str]]:
    """The page, and a policy by which a browser runs its own script and style and talks to this server, and nothing else."""
    text = PAGE.read_text(encoding="utf-8")
    sources = {f"{kind}-src": _hashes(text, tag) for kind, tag in (("script", "script"), ("style", "style"))}
    policy = {
        "default-src": "'none'", "connect-src": "'self'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'",
        "frame-ancestors": "'none'", **sources,
    }  # fmt: skip
    said = "; ".join(f"{name} {value}" for name, value in policy.items())
    return text.encode(), {"Content-Security-Policy": said, "Referrer-Policy": "no-referrer"}


def _hashes(text: str, tag: str) -> str:
    parts = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts)
    return " ".join(f"'sha256-{digest}'" for digest in digests)
