"""Models by their name on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from jaxllm.core.types import UserError

PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.bpe")  # never a pickle
TIMEOUT = 5.0  # seconds for the first answer: without a network the error comes at once
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def fetch(name: str, *, revision: str | None = None) -> Path:
    """The local directory of a model's config, safetensors and tokenizer files, downloaded unless the cache has them."""
    from huggingface_hub import snapshot_download

    if not NAME.fullmatch(name) or Path(name).exists():
        raise UserError(f"{name}: not a name on the hub (org/name): give a local directory to hf.load")
    given = {"repo_id": name, "revision": revision, "allow_patterns": list(PATTERNS)}
    if not _reachable(name, revision):
        return _cached(given, name)
    try:
        return Path(snapshot_download(**given))
    except Exception as error:  # the HTTP library's own errors, whichever it is
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{name}: the download stopped ({str(error)[:200]}): run it again, it goes on from there") from None


def _reachable(name: str, revision: str | None) -> bool:
    """Whether the hub answers, asked once: a download would try for minutes. UserError when it knows no such model."""
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub

    try:
        HfApi().model_info(name, revision=revision, timeout=TIMEOUT)
        return True
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError):  # a gated repository is one of the first
        at = f" at {revision}" if revision else ""
        raise UserError(f"{name}{at}: not on the hub, or not for you: check the name, accept its licence, set HF_TOKEN") from None
    except Exception:
        return False


def _cached(given: dict, name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(**given, local_files_only=True))
    except OSError:
        raise UserError(f"{name}: offline, and not in the cache: pass a local path with config.json and safetensors") from None
