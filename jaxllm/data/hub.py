"""Data sets of the `datasets` library: saved on disk, or by their name on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from jaxllm.core.types import UserError

TIMEOUT = 5.0  # seconds for the hub's first answer


def from_disk(path: Path, split: str) -> Any:
    """The split of a directory that `datasets` has written. UserError when it cannot be read or has no such split."""
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises what its formats raise
        raise UserError(f"{path}: not a saved dataset that can be read ({first_line(error)})") from None
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise UserError(f"{path}: no split {split!r}; there are {', '.join(found)}")
        return found[split]
    return found


def load(path: str, split: str) -> Any:
    """The split of `hf:name` or `hf:name:configuration`; without a network from the cache. UserError says what is wrong."""
    import datasets

    name, _, config = path.removeprefix("hf:").partition(":")
    reachable = _reachable(name)
    before, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, not reachable  # else it would try for minutes
    try:
        return datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # offline, unknown, gated, no such split: each its own type
        if not reachable:
            raise UserError(f"{path}: offline, and not in the cache: pass a local path, of a file or a directory") from None
        raise UserError(
            f"{path}: the data set was not read ({type(error).__name__}: {first_line(error)}); check the name, the "
            f"split {split!r} and the network, or give the path of a file"
        ) from None
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _reachable(name: str) -> bool:
    """Whether the hub answers, asked once."""
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub

    try:
        HfApi().dataset_info(name, timeout=TIMEOUT)
    except hub.HfHubHTTPError:  # it answered, if only to refuse: loading says why
        return True
    except Exception:
        return False
    return True


def rows(dataset: Any, where: str) -> Iterator[tuple[str, Callable[[], dict]]]:
    if len(dataset) == 0:
        raise UserError(f"{where}: empty: there are no rows in it")
    for i, row in enumerate(dataset):
        yield f"{where} row {i + 1}", partial(dict, row)


def first_line(error: Exception) -> str:
    """The beginning of what an error says."""
    text = (str(error).strip() or type(error).__name__).split("\n")[0]
    return text if len(text) <= 60 else text[:57] + "..."
