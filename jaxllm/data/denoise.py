"""Text to text: span corruption and prefix-LM of plain text, pairs of texts, and how tasks are mixed (T5, arXiv 1910.10683).

A record has two sides: {"inputs": {"tokens", "segments"}} is what the encoder reads, and tokens, targets, segments and mask are
the decoder's, as in `pack`: its tokens are the targets one further on behind `start`, T5's pad. Segment j reads segment j.

Noise is drawn with a counter-based generator from (seed, copy), a fixed number of draws a row: row i of copy c is the same in
every process and every version of numpy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxllm.core.types import UserError
from jaxllm.data import chat, pack
from jaxllm.data.tokenizer import Tokenizer

SENTINELS = 100
CHUNK = 4096  # rows that are corrupted at a time: bounds the memory of the draws
DENSITY, MEAN_SPAN = 0.15, 3.0  # the share of tokens that is corrupted, and the mean length of a span
COLUMNS = (("input", "target"), ("inputs", "targets"), ("prompt", "completion"))


class Pair(NamedTuple):
    """inputs, targets int32 [m], [n]: each with its eos."""

    inputs: np.ndarray
    targets: np.ndarray


# ---- sentinels


def with_sentinels(tokenizer: Tokenizer, n: int = SENTINELS) -> Tokenizer:
    """The tokenizer with <extra_id_0>, <extra_id_1>, ... counting down from the top of its vocabulary.

    Those that its file has, or `n` ids above its own: text never becomes one, decode drops them, and its files stay as they
    are, so that what is loaded again gets the same ids.
    """
    if len(sentinel_ids(tokenizer)):
        return tokenizer
    size = tokenizer.vocab_size

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode([i for i in ids if int(i) < size])

    def piece(i: int) -> str:
        return tokenizer.piece(i) if int(i) < size else f"<extra_id_{size + n - 1 - int(i)}>"

    return dataclasses.replace(tokenizer, vocab_size=size + n, decode=decode, piece=piece)


def sentinel_ids(tokenizer: Tokenizer) -> np.ndarray:
    """int32 [n]: the ids of <extra_id_0>, <extra_id_1>, ... as far as the vocabulary has them."""
    found = {tokenizer.piece(i): i for i in range(tokenizer.vocab_size)}
    names = (f"<extra_id_{i}>" for i in range(len(found)))
    ids = []
    for name in names:
        if name not in found:
            break
        ids.append(found[name])
    return np.array(ids, np.int32)


# ---- span corruption


def noise_counts(raw: int, density: float = DENSITY, mean_span: float = MEAN_SPAN) -> tuple[int, int]:
    """(noise tokens, spans) of `raw` tokens, at least 2: one of each side remains, and every span and gap has a token."""
    noise = min(max(round(raw * density), 1), raw - 1)
    return noise, min(max(round(noise / mean_span), 1), noise, raw - noise)


def lengths(raw: int, density: float = DENSITY, mean_span: float = MEAN_SPAN) -> tuple[int, int]:
    """(inputs, targets) that `raw` tokens become: a sentinel for each span on both sides, and an eos."""
    noise, spans = noise_counts(raw, density, mean_span)
    return raw - noise + spans + 1, noise + spans + 1


def raw_length(inputs: int, density: float = DENSITY, mean_span: float = MEAN_SPAN) -> int:
    """The most tokens whose inputs take at most `inputs` positions (512 -> 568). UserError below 3."""
    if inputs < 3 or not 0 < density < 1 or mean_span < 1:
        raise UserError(f"span corruption to {inputs} inputs at density {density} and mean span {mean_span}: needs 3, (0, 1), 1")
    raw = 2
    while lengths(raw + 1, density, mean_span)[0] <= inputs:
        raw += 1
    return raw


def bits_of(*key: int) -> np.random.Philox:
    """A counter-based generator of whole numbers that nothing but the key decides. UserError on a negative one."""
    if min(key) < 0:
        raise UserError(f"config.seed={key[0]} must not be negative")
    return np.random.Philox(np.random.SeedSequence(list(key)))


def noise_masks(
    n: int, raw: int, bits: np.random.Philox, *, density: float = DENSITY, mean_span: float = MEAN_SPAN
) -> np.ndarray:
    """bool [n, raw], True on noise: noise and the rest are each cut into as many random parts, which take turns, rest first."""
    noise, spans = noise_counts(raw, density, mean_span)
    draws = bits.random_raw(n * (raw - 2)).reshape(n, raw - 2)
    parts = [_partition(draws[:, noise - 1 :], raw - noise, spans), _partition(draws[:, : noise - 1], noise, spans)]
    turns = np.stack(parts, axis=2).reshape(-1)
    return np.repeat(np.arange(len(turns)) % 2 == 1, turns).reshape(n, raw)


def _partition(draws: np.ndarray, total: int, parts: int) -> np.ndarray:
    """[n, parts] of at least 1 with sum `total`, every such way equally likely: cuts are `parts - 1` of the total - 1 gaps."""
    cuts = np.sort(np.argsort(draws, axis=1, kind="stable")[:, : parts - 1], axis=1) + 1
    edges = [np.zeros((len(draws), 1), np.int64), cuts, np.full((len(draws), 1), total)]
    return np.diff(np.concatenate(edges, axis=1), axis=1)


def corrupt(tokens: np.ndarray, mask: np.ndarray, sentinels: np.ndarray, eos: int) -> tuple[np.ndarray, np.ndarray]:
    """(inputs [n, i], targets [n, t]) of tokens and a mask of `noise_masks`, both [n, raw].

    Inputs: span k of the noise is the k-th sentinel. Targets: the k-th sentinel, then the tokens of span k. Both end with eos.
    """
    begins = np.diff(mask, axis=1, prepend=True)  # rows begin with a span of text and end with one of noise
    begins[:, 0] = True
    sides = []
    for gone in (mask, ~mask):
        first = begins & gone
        number = np.cumsum(first, axis=1) - 1
        if (spans := int(number.max(initial=0)) + 1) > len(sentinels):
            raise UserError(
                f"{spans} noise spans a row, but the vocabulary has {len(sentinels)} sentinels: lower config.data.length"
            )
        values = np.where(first, sentinels[np.maximum(number, 0)], tokens)
        side = values[~gone | first].reshape(len(tokens), -1)
        sides.append(np.pad(side, ((0, 0), (0, 1)), constant_values=eos).astype(np.int32))
    return sides[0], sides[1]


def stream(tokenizer: Tokenizer, documents: Iterable[str], raw: int) -> np.ndarray:
    """int32 [n, raw]: the documents one after another, each with its eos, cut into rows; the rest at the end is left out."""
    ids = [i for text in documents for i in (*tokenizer.encode(text), tokenizer.specials["eos"])]
    n = len(ids) // raw
    return np.array(ids[: n * raw], np.int32).reshape(n, raw)


def spans(
    rows: np.ndarray, tokenizer: Tokenizer, seed: int, *, copies: int = 1, density: float = DENSITY, mean_span: float = MEAN_SPAN
) -> pack.Record:
    """The record of rows [n, raw] with spans corrupted, `copies` times with other noise: [copies * n, ...], nothing padded."""
    sentinels, eos = sentinel_ids(tokenizer), tokenizer.specials["eos"]
    sides = []
    for copy in range(copies):
        bits = bits_of(seed, copy)
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            sides.append(corrupt(part, noise_masks(*part.shape, bits, density=density, mean_span=mean_span), sentinels, eos))
    inputs, targets = (np.concatenate(side) for side in zip(*sides, strict=True))
    return {
        "inputs": {"tokens": inputs, "segments": np.ones_like(inputs)},
        "tokens": shift_right(targets, tokenizer.specials["pad"]), "targets": targets,
        "segments": np.ones_like(targets), "mask": np.ones(targets.shape, bool),
    }  # fmt: skip


def shift_right(targets: np.ndarray, start: int) -> np.ndarray:
    """[..., t] -> [..., t]: what the decoder reads to predict the targets."""
    return np.concatenate([np.full_like(targets[..., :1], start), targets[..., :-1]], axis=-1)


def prefix_lm(rows: np.ndarray, tokenizer: Tokenizer, seed: int) -> list[Pair]:
    """A row [raw] is cut at a random place with a token on either side: the encoder reads the first part (section 3.2.1)."""
    n, raw = rows.shape
    bits = bits_of(seed).random_raw(n)
    eos = np.array([tokenizer.specials["eos"]], np.int32)
    cuts = 1 + (bits % np.uint64(raw - 1)).astype(int)
    return [Pair(np.concatenate([row[:cut], eos]), np.concatenate([row[cut:], eos])) for row, cut in zip(rows, cuts, strict=True)]


# ---- pairs of texts


def text_pair(row: Any, where: str) -> tuple[str, str]:
    """(input, target) of a row with input and target, or prompt and completion; a `task` stands before the input: "task: input".

    UserError naming `where`, the columns that are there, and one that is not text.
    """
    have = chat.columns(row, where)
    for names in COLUMNS:
        if all(name in have for name in names):
            texts = [row[name] for name in (*names, *(["task"] if "task" in have else []))]
            if not all(isinstance(text, str) for text in texts):
                raise UserError(f"{where}: {' and '.join(names)} must be text")
            source, target, *task = texts
            return (f"{task[0]}: {source}" if task and task[0] else source), target
    raise UserError(f"{where} needs input and target, or prompt and completion; {chat.describe(have)}")


def encode_pair(tokenizer: Tokenizer, source: str, target: str) -> Pair:
    """Both texts as tokens, each with its eos."""
    eos = tokenizer.specials["eos"]
    return Pair(*(np.array([*tokenizer.encode(text), eos], np.int32) for text in (source, target)))


def pack_pairs(
    pairs: Sequence[Pair], input_length: int, target_length: int, *, start: int = 0, window: int = 1024
) -> tuple[pack.Record, pack.Report]:
    """(record, report) with several pairs a row: the first row of its window with room on both sides takes a pair.

    Longer inputs are cut before their eos, which stays; longer targets lose it, so that no false end is learnt. Both count.
    """
    kept, report = _fit(pairs, input_length, target_length)
    return _write(kept, _first_fit(kept, (input_length, target_length), window), (input_length, target_length), start, report)


def pad_pairs(pairs: Sequence[Pair], input_length: int, target_length: int, *, start: int = 0) -> tuple[pack.Record, pack.Report]:
    """One pair a row in the given order, cut and counted as in `pack_pairs`."""
    kept, report = _fit(pairs, input_length, target_length)
    return _write(kept, [(row, (0, 0), 1) for row in range(len(kept))], (input_length, target_length), start, report)


def _fit(pairs: Sequence[Pair], input_length: int, target_length: int) -> tuple[list[Pair], pack.Report]:
    if input_length < 1 or target_length < 1:
        raise UserError(f"lengths of inputs {input_length} and targets {target_length} must be at least 1")
    kept = [Pair(a if len(a) <= input_length else np.append(a[: input_length - 1], a[-1]), b[:target_length]) for a, b in pairs]
    empty = [i for i, pair in enumerate(pairs) if len(pair.targets) < 2]
    return kept, {
        "examples": len(pairs), "dropped": 0, "untrained": len(empty), "first_untrained": empty[0] if empty else None,
        "truncated": sum(len(a) > input_length or len(b) > target_length for a, b in pairs),
        "truncated_inputs": sum(len(a) > input_length for a, _ in pairs),
        "truncated_targets": sum(len(b) > target_length for _, b in pairs),
    }  # fmt: skip


def _first_fit(pairs: list[Pair], room: tuple[int, int], window: int) -> list[tuple[int, tuple[int, int], int]]:
    """(row, offsets on both sides, segment) of every pair."""
    places, rows = [], 0
    for begin in range(0, len(pairs), window):
        part = pairs[begin : begin + window]
        left = np.tile(np.array(room), (len(part), 1))
        count = np.zeros(len(part), int)
        for pair in part:
            size = (len(pair.inputs), len(pair.targets))
            r = int((left >= size).all(axis=1).argmax())
            count[r] += 1
            places.append((rows + r, (room[0] - left[r, 0], room[1] - left[r, 1]), int(count[r])))
            left[r] -= size
        rows += int((count > 0).sum())
    return places


def _write(pairs: list[Pair], places: list, room: tuple[int, int], start: int, report: pack.Report):
    """The record with every pair at its place, and the finished report."""
    rows = max((row for row, _, _ in places), default=-1) + 1
    inputs = {name: np.zeros((rows, room[0]), np.int32) for name in ("tokens", "segments")}
    record = {name: np.zeros((rows, room[1]), np.int32) for name in ("tokens", "targets", "segments")}
    for pair, (row, (i, t), segment) in zip(pairs, places, strict=True):
        source, target = slice(i, i + len(pair.inputs)), slice(t, t + len(pair.targets))
        inputs["tokens"][row, source], inputs["segments"][row, source] = pair.inputs, segment
        record["tokens"][row, target] = shift_right(pair.targets, start)
        record["targets"][row, target], record["segments"][row, target] = pair.targets, segment
    record["mask"] = record["segments"] != 0
    used, trained = int(np.count_nonzero(inputs["segments"])), int(record["mask"].sum())
    counts = {"rows": rows, "tokens": used + trained, "trained_tokens": trained}
    return {"inputs": inputs, **record}, {**report, **counts, "fill": (used + trained) / max(1, rows * sum(room))}


# ---- mixing tasks


def mixing_rates(sizes: Sequence[int], *, limit: int | None = None, temperature: float = 1.0) -> np.ndarray:
    """float [tasks], sum 1: r_m = min(e_m, K) / sum, then r_m ** (1 / T) made to sum to 1 (section 3.5.2).

    sizes: examples e_m of each task; limit: K, so that a large task does not crowd out the others; temperature 1 is
    proportional, and a large one is equal mixing.
    """
    if not sizes or min(sizes) < 1 or temperature <= 0 or (limit is not None and limit < 1):
        raise UserError(f"mixing tasks of {list(sizes)} examples, limit {limit}, temperature {temperature}: all must be above 0")
    capped = np.minimum(np.array(sizes, float), np.inf if limit is None else limit)
    rates = (capped / capped.sum()) ** (1 / temperature)
    return rates / rates.sum()


def mix(sizes: Sequence[int], rates: np.ndarray, n: int, seed: int) -> list[tuple[int, int]]:
    """n draws (task, example): tasks at their rates; a task's examples in a new seeded order each time around, none left out."""
    bits = bits_of(seed).random_raw(n)
    task = np.searchsorted(np.cumsum(rates)[:-1], bits / 2.0**64, side="right")
    example = np.empty(n, np.int64)
    for t, size in enumerate(sizes):
        at = np.flatnonzero(task == t)
        orders = [_order(size, seed, t, epoch) for epoch in range(-(-len(at) // size))]
        example[at] = np.concatenate([*orders, np.empty(0, np.int64)])[: len(at)]
    return list(zip(task.tolist(), example.tolist(), strict=True))


def _order(size: int, seed: int, task: int, epoch: int) -> np.ndarray:
    return np.argsort(bits_of(seed, task, epoch).random_raw(size), kind="stable")
