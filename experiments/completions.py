"""Sampling completions of prompts from a policy: shared by pairs, PPO and the quickstart."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm.core.types import UserError
from jaxllm.data import chat
from jaxllm.generate import decode


class Completions(NamedTuple):
    """texts [n]; ended bool [n]; lengths int [n] in tokens, the end token included; record: the sequence record with logps."""

    texts: list[str]
    ended: np.ndarray
    lengths: np.ndarray
    record: dict[str, np.ndarray]


def prompt_columns(tokenizer: Any, prompts: list, max_prompt: int, where: str = "prompts") -> dict[str, np.ndarray]:
    """{tokens [n, p], lengths [n]} of chat prompts with the generation prompt, p the longest rounded up to a multiple of 4.

    UserError when one is longer than max_prompt.
    """
    ids = [p if isinstance(p, np.ndarray) else chat.prompt_ids(tokenizer, p) for p in prompts]
    if (longest := max(map(len, ids))) > max_prompt:
        row = max(range(len(ids)), key=lambda i: len(ids[i]))
        raise UserError(
            f"{where} row {row + 1} has {longest} tokens, more than max_prompt={max_prompt}: raise it or shorten the row"
        )
    tokens = np.zeros((len(ids), min(-(-longest // 4) * 4, max_prompt)), np.int32)
    for row, x in zip(tokens, ids, strict=True):
        row[: len(x)] = x
    return {"tokens": tokens, "lengths": np.array([len(x) for x in ids], np.int32)}


def sampler(
    model: Any, tokenizer: Any, *, max_new_tokens: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
    mesh: Any = None,
) -> Any:  # fmt: skip
    """A compiled (params, {tokens, lengths}, key, row_offset) -> (Samples, sequence record); over a mesh of `data` alone."""
    stop = chat.stop_ids(tokenizer)

    def rows(params: Any, tokens: Any, lengths: Any, key: Any, row_offset: Any) -> Any:
        return decode.generate(
            model, params, tokens, lengths, key, max_new_tokens=max_new_tokens, stop=stop,
            temperature=temperature, top_k=top_k, top_p=top_p, row_offset=row_offset,
        )  # fmt: skip

    if mesh is not None and mesh.size == mesh.shape["data"] > 1:
        rows = decode.over_data(rows, mesh)

    @jax.jit
    def sample(params: Any, prompts: dict, key: Any, row_offset: Any):
        s = rows(params, prompts["tokens"], prompts["lengths"], key, row_offset)
        return s, decode.to_record(s)

    return sample


def complete(sample: Any, params: Any, tokenizer: Any, prompts: dict[str, np.ndarray], key: Any, batch_size: int) -> Completions:
    """Completions of all prompts, batch_size at a time; the last batch is filled up so that nothing compiles twice."""
    n = len(prompts["lengths"])
    texts: list[str] = []
    kept: list[Any] = []
    for start in range(0, n, batch_size):
        index = np.minimum(np.arange(start, start + batch_size), n - 1)
        s, record = jax.device_get(sample(params, {k: v[index] for k, v in prompts.items()}, key, start))
        kept.append((record, s.stopped, s.lengths - s.prompt_lengths))
        ends = s.lengths - s.stopped  # without the stop token
        texts += [tokenizer.decode(t[a:b].tolist()) for t, a, b in zip(s.tokens, s.prompt_lengths, ends, strict=True)]
    record, ended, lengths = jax.tree.map(lambda *xs: np.concatenate(xs)[:n], *kept)
    return Completions(texts[:n], ended, lengths, record)
