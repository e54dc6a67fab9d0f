"""Masked language modelling's data: which ids are special, what is masked, and pairs of sentences.

A vocabulary trained here has no mask and no class token. `extended` gives the tokenizer with them: ids that stand above its
own, so that the model has vocabulary rows for them and text never becomes one; the tokenizer's files stay as they are, and
`extended` of what is loaded again gives the same ids. Where published vocabularies have them (BERT's [CLS], [SEP], [MASK];
RoBERTa's <s>, </s>, <mask>), those are used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core.types import Batch, Key, UserError
from jaxllm.data import pack
from jaxllm.data.chat import Example
from jaxllm.data.tokenizer import Tokenizer

FALLBACKS = {"cls": "bos", "sep": "eos", "mask": ""}  # what may stand for a special that a vocabulary lacks


def extended(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with `cls`, `sep` and `mask` among its specials: its own, else bos and eos, else ids appended above."""
    size = tokenizer.vocab_size
    found = {name: tokenizer.specials.get(name, tokenizer.specials.get(other)) for name, other in FALLBACKS.items()}
    lacking = [name for name, i in found.items() if i is None]
    found |= {name: size + n for n, name in enumerate(lacking)}
    names = {found[name]: f"<|{name}|>" for name in lacking}

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode([i for i in ids if int(i) < size])

    def piece(i: int) -> str:
        return names.get(int(i)) or tokenizer.piece(i)

    return dataclasses.replace(
        tokenizer, vocab_size=size + len(lacking), specials={**tokenizer.specials, **found}, decode=decode, piece=piece
    )


def ordinary_ids(tokenizer: Tokenizer) -> np.ndarray:
    """int32 [n]: every id that is no special one, which random replacement may draw."""
    return np.setdiff1d(np.arange(tokenizer.vocab_size, dtype=np.int32), list(tokenizer.specials.values()))


# ---- masking


def mask_tokens(
    key: Key, tokens: jax.Array, eligible: jax.Array, *, mask_id: int, vocab: jax.Array | np.ndarray, rate: float = 0.15
) -> tuple[jax.Array, jax.Array]:
    """(inputs int [b, l], chosen bool [b, l]): each eligible token is chosen with probability `rate`; of the chosen 80 % become
    `mask_id`, 10 % an id drawn from `vocab` [n], 10 % stay as they are (arXiv 1810.04805, 3.1). Pure, for the device."""
    which, how, what = jax.random.split(key, 3)
    chosen = eligible & (jax.random.uniform(which, tokens.shape) < rate)
    kind = jax.random.uniform(how, tokens.shape)
    vocab = jnp.asarray(vocab, tokens.dtype)
    drawn = vocab[jax.random.randint(what, tokens.shape, 0, len(vocab))]
    replaced = jnp.where(kind < 0.8, jnp.asarray(mask_id, tokens.dtype), jnp.where(kind < 0.9, drawn, tokens))
    return jnp.where(chosen, replaced, tokens), chosen


def dynamic(*, mask_id: int, vocab: Any, rate: float = 0.15) -> Callable[[Key, Batch], tuple[jax.Array, jax.Array]]:
    """corrupt(key, batch) for `losses.mlm`: drawn anew from every step's key (RoBERTa, arXiv 1907.11692, 4.1)."""

    def corrupt(key: Key, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return mask_tokens(key, batch["tokens"], batch["eligible"], mask_id=mask_id, vocab=vocab, rate=rate)

    return corrupt


def static(key: Key, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """corrupt(key, batch) that reads the columns of `with_static_masks`: a row is masked the same way in every epoch."""
    return batch["inputs"], batch["chosen"]


def with_static_masks(record: pack.Record, seed: int, *, mask_id: int, vocab: Any, rate: float = 0.15) -> pack.Record:
    """The record with the columns inputs and chosen, drawn once: also what an evaluation needs, to be the same every time."""
    inputs, chosen = mask_tokens(
        jax.random.key(seed), record["tokens"], record["eligible"], mask_id=mask_id, vocab=vocab, rate=rate
    )
    return {**record, "inputs": np.asarray(inputs), "chosen": np.asarray(chosen)}


def unigram_loss(train: pack.Record, held_out: pack.Record, vocab_size: int) -> float:
    """Nats a held-out eligible token costs under the frequencies of the training ones, counts plus 1: what to beat."""
    counts = 1.0 + np.bincount(train["tokens"][train["eligible"]], minlength=vocab_size)
    return float(-np.log(counts / counts.sum())[held_out["tokens"][held_out["eligible"]]].mean())


# ---- rows


def frame(tokenizer: Tokenizer, first: Sequence[int], second: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, types) int32 [m] of cls first sep, or cls first sep second sep with the second's types 1.

    A tokenizer that is not `extended` (a decoder's) has no cls, and eos stands for sep.
    """
    cls = [tokenizer.specials["cls"]] if "cls" in tokenizer.specials else []
    sep = tokenizer.specials.get("sep", tokenizer.specials["eos"])
    a, b = [*cls, *first, sep], [] if second is None else [*second, sep]
    return np.array(a + b, np.int32), np.array([0] * len(a) + [1] * len(b), np.int32)


def documents(tokenizer: Tokenizer, texts: Iterable[str], length: int) -> tuple[pack.Record, pack.Report]:
    """Whole documents, framed and packed, one a segment; long ones become several of at most `length` tokens, and no token is
    lost: (tokens, segments int32 and eligible bool, all [rows, length]; report)."""
    if length < 3:
        raise UserError(f"config.data.length={length}: cls, a token and sep need at least 3")
    examples = []
    for text in texts:
        ids = tokenizer.encode(text)
        examples += [frame(tokenizer, ids[i : i + length - 2])[0] for i in range(0, len(ids), length - 2)]
    record, report = pack.pack([_unshifted(tokenizer, tokens) for tokens in examples], length)
    return _eligible(tokenizer, record), report


def next_sentence_rows(tokenizer: Tokenizer, texts: Sequence[str], length: int, seed: int) -> tuple[pack.Record, pack.Report]:
    """cls A sep B sep of adjacent parts of a document, where every second B comes from another document: one pair a row.

    (tokens, segments, types int32 and eligible bool [rows, length], is_next int32 [rows]; report). arXiv 1810.04805, A.2.
    UserError when fewer than two documents have two parts.
    """
    half = (length - 3) // 2
    if half < 1:
        raise UserError(f"config.data.length={length}: a pair of sentences needs at least 5")
    parts = [_halves(tokenizer.encode(text), half) for text in texts]
    pairs = [(n, a, b) for n, document in enumerate(parts) for a, b in zip(document[0::2], document[1::2], strict=False)]
    if len({n for n, _, _ in pairs}) < 2:
        raise UserError(f"next sentences need at least 2 documents of two parts of {half} tokens: lower config.data.length")
    rng = np.random.default_rng(seed)
    is_next = rng.permutation(np.arange(len(pairs)) % 2).astype(np.int32)
    framed = [frame(tokenizer, a, b if real else _other(pairs, n, rng)) for (n, a, b), real in zip(pairs, is_next, strict=True)]
    record, report = pack.pad([_unshifted(tokenizer, tokens) for tokens, _ in framed], length)
    types = np.zeros_like(record["tokens"])
    for row, (_, kinds) in zip(types, framed, strict=True):
        row[: len(kinds)] = kinds
    return {**_eligible(tokenizer, record), "types": types, "is_next": is_next}, report


def _halves(ids: Sequence[int], half: int) -> list[Sequence[int]]:
    """Parts of `half` tokens; a document of fewer than twice that is cut in the middle."""
    size = min(half, max(1, len(ids) // 2))
    return [ids[i : i + size] for i in range(0, len(ids) // size * size, size)] if len(ids) > 1 else []


def _other(pairs: list[tuple], number: int, rng: np.random.Generator) -> Sequence[int]:
    """The B of a random pair of another document."""
    while True:
        n, _, b = pairs[rng.integers(len(pairs))]
        if n != number:
            return b


def _unshifted(tokenizer: Tokenizer, tokens: np.ndarray) -> Example:
    """An example whose inputs are all of its tokens: `pack` takes the last one for a target only."""
    return Example(np.append(tokens, np.int32(tokenizer.specials["pad"])), np.ones(len(tokens) + 1, bool))


def _eligible(tokenizer: Tokenizer, record: pack.Record) -> pack.Record:
    eligible = (record["segments"] != 0) & ~np.isin(record["tokens"], list(tokenizer.specials.values()))
    return {"tokens": record["tokens"], "segments": record["segments"], "eligible": eligible}
