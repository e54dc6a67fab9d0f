"""Sampling completions of prompts from a policy: shared by pairs, PPO and the quickstart."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import teach
from jaxllm.adapt import quantize
from jaxllm.core.types import UserError
from jaxllm.data import chat
from jaxllm.data.text import named
from jaxllm.generate import decode, engine
from jaxllm.models import paged
from jaxllm.train import processes

PAGE = 16  # positions of a page, where rows are served from a queue


class Completions(NamedTuple):
    """texts [n]; ended bool [n]; lengths int [n] in tokens, the end token included; record: the sequence record with logps."""

    texts: list[str]
    ended: np.ndarray
    lengths: np.ndarray
    record: dict[str, np.ndarray]


def prompt_columns(tokenizer: Any, prompts: list, max_prompt: int, where: Any = "prompts") -> dict[str, np.ndarray]:
    """{tokens [n, p], lengths [n]} of chat prompts with the generation prompt, p the longest rounded up to a multiple of 4.

    UserError when one is longer than max_prompt; where: what they are called together, or where each of them stands.
    """
    ids = [p if isinstance(p, np.ndarray) else chat.prompt_ids(tokenizer, p) for p in prompts]
    if (longest := max(map(len, ids))) > max_prompt:
        row = max(range(len(ids)), key=lambda i: len(ids[i]))
        raise UserError(
            f"{named(where, row)} has {longest} tokens, more than max_prompt={max_prompt}: raise it or shorten the row"
        )
    tokens = np.zeros((len(ids), min(-(-longest // 4) * 4, max_prompt)), np.int32)
    for row, x in zip(tokens, ids, strict=True):
        row[: len(x)] = x
    return {"tokens": tokens, "lengths": np.array([len(x) for x in ids], np.int32)}


def sampler(
    model: Any, tokenizer: Any, *, max_new_tokens: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
    mesh: Any = None, group: int = 1, slots: int = 0, int8: bool = False,
) -> Any:  # fmt: skip
    """A compiled (params, {tokens, lengths}, key, row_offset) -> (Samples, sequence record); over a mesh of `data` alone.

    group: completions of each prompt, as neighbours, from one prefill. slots above 0: continuous batching with so many rows
    at once (on each device of `data`), whose places others take as they end; the samples are the same. int8: the kernels of
    attention and feed-forward are rounded for sampling.
    """
    options = {
        "max_new_tokens": max_new_tokens, "stop": chat.stop_ids(tokenizer), "temperature": temperature, "top_k": top_k,
        "top_p": top_p,
    }  # fmt: skip

    options, model = teach.at("sampler", options), teach.at("model", model)

    def rows(params: Any, tokens: Any, lengths: Any, key: Any, row_offset: Any, group: int = group) -> Any:
        given = (model, quantize.quantize(model, params) if int8 else params, tokens, lengths, key)
        if not slots:
            return decode.generate(*given, group=group, row_offset=row_offset, **options)
        most = min(slots, group * len(lengths))
        pages = -(-(tokens.shape[1] + max_new_tokens) // PAGE) * most
        pool = paged.empty(model, slots=most, pages=pages, page=PAGE)
        return engine.serve(*given, pool, group=group, row_offset=row_offset, **options).samples

    if mesh is not None and mesh.size == mesh.shape["data"] > 1:
        rows = decode.over_data(rows, mesh, group)

    @jax.jit
    def sample(params: Any, prompts: dict, key: Any, row_offset: Any):
        s = rows(params, prompts["tokens"], prompts["lengths"], key, row_offset)
        return s, decode.to_record(s)

    return sample


def complete(
    sample: Any, params: Any, tokenizer: Any, prompts: dict[str, np.ndarray], key: Any, batch_size: int, group: int = 1
) -> Completions:
    """`group` completions (the sampler's) of all prompts, batch_size at a time; the last batch is filled up: one compilation."""
    n, at = len(prompts["lengths"]), max(1, batch_size // group)
    texts: list[str] = []
    kept: list[Any] = []
    for start in range(0, n, at):
        index = np.minimum(np.arange(start, start + at), n - 1)
        s, record = processes.on_host(sample(params, {k: v[index] for k, v in prompts.items()}, key, start * group))
        kept.append((record, s.stopped, s.lengths - s.prompt_lengths))
        ends = s.lengths - s.stopped  # without the stop token
        texts += [tokenizer.decode(t[a:b].tolist()) for t, a, b in zip(s.tokens, s.prompt_lengths, ends, strict=True)]
    record, ended, lengths = jax.tree.map(lambda *xs: np.concatenate(xs)[: n * group], *kept)
    return Completions(texts[: n * group], ended, lengths, record)


def drawer(loaded: Any, prompts: dict[str, np.ndarray], samples: int, batch_size: int, **options: Any) -> Any:
    """draw(params, key) -> Completions: `samples` neighbours of every prompt, about batch_size at once; options: `sampler`'s."""
    # what is drawn at once is at most batch_size, and a prompt is read once for a whole part of its samples
    group = max(g for g in range(1, samples + 1) if samples % g == 0 and g <= max(1, batch_size))
    sample = sampler(loaded.model, loaded.tokenizer, group=group, **options)
    wide = {name: np.repeat(column, samples // group, axis=0) for name, column in prompts.items()}
    return lambda params, key: complete(sample, params, loaded.tokenizer, wide, key, batch_size, group)
