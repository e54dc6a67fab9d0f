"""Labelled rows in four shapes: of texts and pairs of texts, of words, of spans and of choices.

    {"text", "label"}, with "text_b" for pairs       -> tokens, segments, types [n, l], label [n]
    {"words", "labels"}, as many labels as words     -> tokens, segments, types [n, l], labels, mask [n, l]
    {"question", "context", "answer"}, perhaps       -> tokens, segments, types [n, l], start, end [n]
        "start", the answer's character in context
    {"text", "choices", "label"}, an index           -> tokens, segments, types [n, c, l], label [n]

Texts are framed as in `masking.frame`. Labels are text or whole numbers, all of one type. What does not fit into `length` is
cut, the longer text of a pair first; a span whose answer is cut off is left out, and both are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxllm.core.types import UserError
from jaxllm.data.chat import columns as columns_of
from jaxllm.data.masking import frame
from jaxllm.data.text import named
from jaxllm.data.tokenizer import Tokenizer

Label = str | int
Where = str | Sequence[str]  # what all rows are called together, or where each of them stands


class Labelled(NamedTuple):
    """columns: arrays of rows; names: what the label ids mean; texts: one a row, for baselines; truncated, dropped: counts."""

    columns: dict[str, np.ndarray]
    names: tuple[Label, ...]
    texts: list[str]
    truncated: int
    dropped: int


class Kind(NamedTuple):
    """needs: the columns of a row; check(row, where) raises UserError;
    encode(tokenizer, rows, where, length, names) -> Labelled; labels(columns) -> int [m]."""

    needs: tuple[str, ...]
    check: Callable[[dict, str], Any]
    encode: Callable[..., Labelled]
    labels: Callable[[dict[str, np.ndarray]], np.ndarray]


def kind_of(row: Any, where: str) -> str:
    """The key of KINDS whose columns a row has. UserError when it has those of none."""
    have = set(columns_of(row, where))
    for name, kind in KINDS.items():
        if have.issuperset(kind.needs):
            return name
    shapes = "; ".join(", ".join(kind.needs) for kind in KINDS.values())
    raise UserError(f"{where}: no labelled row (its columns: {', '.join(sorted(have)) or 'none'}): give one of: {shapes}")


def check_row(row: Any, where: str) -> dict:
    """The row, when it is one of KINDS. UserError naming `where` when it is not."""
    KINDS[kind_of(row, where)].check(row, where)
    return row


def encode(
    tokenizer: Tokenizer, rows: Sequence[dict], where: Where, length: int, names: Sequence[Label] | None = None
) -> tuple[str, Labelled]:
    """(the rows' kind, Labelled). where: of all rows, or of each; names: the labels of training, which held-out rows may not
    go beyond.

    UserError naming the row: mixed kinds, labels of a type that is none, fewer than 2 labels, an answer that is not there.
    """
    if not rows:
        raise UserError(f"{where or 'the data'}: there are no rows")
    kind = kind_of(rows[0], named(where, 0))
    for i, row in enumerate(rows):
        if missing := [c for c in KINDS[kind].needs if row.get(c) is None]:
            raise UserError(
                f"{named(where, i)}: no column {missing[0]!r}, which {named(where, 0)} has: one kind of row a file, please"
            )
        KINDS[kind].check(row, named(where, i))
    return kind, KINDS[kind].encode(tokenizer, rows, where, length, names)


# ---- labels


def label_names(labels: Sequence[Any], where: Where) -> tuple[Label, ...]:
    """The distinct labels in order. UserError on mixed types and on fewer than 2 labels."""
    for i, label in enumerate(labels):
        if type(label) is not type(labels[0]):
            raise UserError(
                f"{named(where, i)}: label {label!r} is not of the type of {labels[0]!r} ({named(where, 0)}): use one type"
            )
    names = tuple(sorted(set(labels)))
    if len(names) < 2:
        raise UserError(f"{named(where, 0)}: every label is {names[0]!r}: at least 2 different ones are needed")
    return names


def _label_ids(labels: Sequence[Any], names: Sequence[Label] | None, where: Where) -> tuple[np.ndarray, tuple[Label, ...]]:
    names = label_names(labels, where) if names is None else tuple(names)
    ids = {name: i for i, name in enumerate(names)}
    for i, label in enumerate(labels):
        if label not in ids:
            raise UserError(f"{named(where, i)}: label {label!r} does not occur in training, which has {names[:8]}")
    return np.array([ids[label] for label in labels], np.int32), names


# ---- checks of a row


def _check_label(label: Any, where: str) -> None:
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise UserError(f"{where}: label {label!r} is a {type(label).__name__}: text or a whole number is needed")


def _check_blank(row: dict, column: str, where: str) -> None:
    text = row[column]
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: {column} must be text that is not blank, found {str(text)[:40]!r}")


def _check_text(row: dict, where: str) -> None:
    for column in ("text", "text_b") if row.get("text_b") is not None else ("text",):
        _check_blank(row, column, where)
    _check_label(row["label"], where)


def _check_words(row: dict, where: str) -> None:
    words, labels = row["words"], row["labels"]
    if not isinstance(words, list) or not isinstance(labels, list) or not all(isinstance(w, str) for w in words):
        raise UserError(f"{where}: words and labels must be lists, the words of text")
    if len(words) != len(labels) or not words:
        raise UserError(f"{where}: {len(words)} words and {len(labels)} labels: one label a word is needed, and a word at least")
    for label in labels:
        _check_label(label, where)


def _check_choice(row: dict, where: str) -> None:
    choices, label = row["choices"], row["label"]
    _check_blank(row, "text", where)
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) for c in choices):
        raise UserError(f"{where}: choices must be a list of 2 texts or more")
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(choices):
        raise UserError(f"{where}: label {label!r} is no index of its {len(choices)} choices (0 to {len(choices) - 1})")


def _answer(row: dict, where: str) -> tuple[str, list[str], tuple[int, int]]:
    """(question, the context's words, the answer's first and last word)."""
    question, context, answer = row["question"], row["context"], row["answer"]
    if not all(isinstance(x, str) and x.strip() for x in (question, context, answer)):
        raise UserError(f"{where}: question, context and answer must be text that is not blank")
    start = context.find(answer) if row.get("start") is None else row["start"]
    if not isinstance(start, int) or start < 0 or context[start : start + len(answer)] != answer:
        raise UserError(f"{where}: the answer {answer[:40]!r} does not stand in the context at {start}")
    words = context.split()
    before = len(context[:start].split()) - (start > 0 and not context[start - 1].isspace() and not answer[0].isspace())
    return question, words, (before, len(context[: start + len(answer)].split()) - 1)


# ---- the four shapes


def _sequence(tokenizer: Tokenizer, rows: Sequence[dict], where: Where, length: int, names: Any) -> Labelled:
    label, names = _label_ids([row["label"] for row in rows], names, where)
    texts = [(row["text"], row.get("text_b") or "") for row in rows]
    framed = [_framed(tokenizer, *map(tokenizer.encode, filter(None, pair)), length=length) for pair in texts]
    columns, cut = _stack(framed, length)
    return Labelled({**columns, "label": label}, names, [" ".join(filter(None, pair)) for pair in texts], cut, 0)


def _token(tokenizer: Tokenizer, rows: Sequence[dict], where: Where, length: int, names: Any) -> Labelled:
    flat = [label for row in rows for label in row["labels"]]
    ids, names = _label_ids(flat, names, [named(where, i) for i, row in enumerate(rows) for _ in row["labels"]])
    columns, cut = _stack([], length, len(rows))
    labels, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    left = iter(ids.tolist())
    for i, row in enumerate(rows):
        pieces = _word_ids(tokenizer, row["words"])
        framed = _framed(tokenizer, sum(pieces, []), length=length)
        cut += _write(columns, i, framed)
        at = framed.first + np.cumsum([0, *map(len, pieces)])[:-1]  # a word's first piece has its label
        for place, piece in zip(at.tolist(), pieces, strict=True):
            label = next(left)
            if piece and place < framed.first + framed.kept:
                labels[i, place], mask[i, place] = label, True
    return Labelled({**columns, "labels": labels, "mask": mask}, names, [" ".join(r["words"]) for r in rows], cut, 0)


def _span(tokenizer: Tokenizer, rows: Sequence[dict], where: Where, length: int, names: Any) -> Labelled:
    framed, ends, texts = [], [], []
    for i, row in enumerate(rows):
        question, words, (first, last) = _answer(row, named(where, i))
        pieces = _word_ids(tokenizer, words)
        one = _framed(tokenizer, tokenizer.encode(question), sum(pieces, []), length=length, fit=_second_alone)
        at = one.second + np.cumsum([0, *map(len, pieces)])
        if at[last + 1] <= one.second + one.kept_second:
            framed.append(one)
            ends.append((at[first], at[last + 1] - 1))
            texts.append(f"{question} {row['context']}")
    if not framed:
        raise UserError(f"{named(where, 0)}: every answer lies beyond config.data.length={length}: raise it")
    columns, cut = _stack(framed, length)
    start, end = np.array(ends, np.int32).T
    return Labelled({**columns, "start": start, "end": end}, ("start", "end"), texts, cut, len(rows) - len(framed))


def _choice(tokenizer: Tokenizer, rows: Sequence[dict], where: Where, length: int, names: Any) -> Labelled:
    most = max(len(row["choices"]) for row in rows)
    columns, cut = _stack([], length, len(rows) * most)
    for i, row in enumerate(rows):
        text = tokenizer.encode(row["text"])
        for j, choice in enumerate(row["choices"]):
            cut += _write(columns, i * most + j, _framed(tokenizer, text, tokenizer.encode(choice), length=length))
    columns = {name: x.reshape(len(rows), most, length) for name, x in columns.items()}
    label = np.array([row["label"] for row in rows], np.int32)
    return Labelled({**columns, "label": label}, tuple(range(most)), [row["text"] for row in rows], cut, 0)


KINDS = {  # the most particular first
    "choice": Kind(("text", "choices", "label"), _check_choice, _choice, lambda c: c["label"]),
    "span": Kind(("question", "context", "answer"), _answer, _span, lambda c: c["start"] * c["tokens"].shape[1] + c["end"]),
    "token": Kind(("words", "labels"), _check_words, _token, lambda c: c["labels"][c["mask"]]),
    "sequence": Kind(("text", "label"), _check_text, _sequence, lambda c: c["label"]),
}


# ---- framing


class _Framed(NamedTuple):
    """tokens, types [m]; first, second: where the texts begin; kept, kept_second: of their tokens; cut: whether any was."""

    tokens: np.ndarray
    types: np.ndarray
    first: int
    kept: int
    second: int
    kept_second: int
    cut: bool


def _longer_first(a: int, b: int, room: int) -> tuple[int, int]:
    """How much stays of texts of a and b tokens."""
    if a + b <= room:
        return a, b
    short = min(a, b, room // 2)
    return (short, room - short) if a <= b else (room - short, short)


def _second_alone(a: int, b: int, room: int) -> tuple[int, int]:
    """The second is cut to what the first leaves, down to one token."""
    kept = min(b, max(1, room - a))
    return min(a, room - kept), kept


def _framed(
    tokenizer: Tokenizer, a: list[int], b: list[int] | None = None, *, length: int, fit: Callable = _longer_first
) -> _Framed:
    """One text, or two, in the frame, cut by `fit` to `length` tokens in all."""
    around = len(frame(tokenizer, [], None if b is None else [])[0])
    if length < around + 2:
        raise UserError(f"config.data.length={length} is too short for a row: {around + 2} is the least")
    kept, kept_second = fit(len(a), len(b or []), length - around)
    tokens, types = frame(tokenizer, a[:kept], None if b is None else b[:kept_second])
    first = len(frame(tokenizer, [])[0]) - 1
    cut = kept + kept_second < len(a) + len(b or [])
    return _Framed(tokens, types, first, kept, first + kept + 1, kept_second, cut)


def _word_ids(tokenizer: Tokenizer, words: Sequence[str]) -> list[list[int]]:
    """The ids of each word as in running text: a vocabulary may put the space before a word into its pieces, or not."""
    own = tokenizer.encode("a") + tokenizer.encode("b") == tokenizer.encode("a b")
    return [list(tokenizer.encode(word if own or i == 0 else f" {word}")) for i, word in enumerate(words)]


def _stack(framed: Sequence[_Framed], length: int, rows: int | None = None) -> tuple[dict[str, np.ndarray], int]:
    """Right-padded columns [rows, length], and how many rows were cut."""
    n = len(framed) if rows is None else rows
    columns = {name: np.zeros((n, length), np.int32) for name in ("tokens", "segments", "types")}
    return columns, sum(_write(columns, i, one) for i, one in enumerate(framed))


def _write(columns: dict[str, np.ndarray], i: int, one: _Framed) -> bool:
    m = len(one.tokens)
    columns["tokens"][i, :m], columns["types"][i, :m], columns["segments"][i, :m] = one.tokens, one.types, 1
    return one.cut


# ---- what a model must beat


def baselines(kind: str, train: Labelled, kept: Labelled) -> dict[str, float]:
    """Accuracies on `kept` that need no model: the commonest label's and, for texts, a bag of words'."""
    known, labels = (KINDS[kind].labels(x.columns) for x in (train, kept))
    out = {"majority": majority(known, labels)}
    if kind == "sequence":
        out["bag_of_words"] = float(np.mean(bag_of_words(train.texts, known, kept.texts) == labels))
    return out


def majority(train: np.ndarray, labels: np.ndarray) -> float:
    """The accuracy of always saying the commonest label of training."""
    return float(np.mean(labels == np.bincount(train).argmax()))


def bag_of_words(train: Sequence[str], train_labels: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """The label of each text under multinomial naive Bayes over words, counts plus 1: int [n]."""
    index: dict[str, int] = {}
    rows = [[index.setdefault(w, len(index)) for w in text.lower().split()] for text in train]
    counts = np.ones((int(train_labels.max()) + 1, len(index)))
    for row, label in zip(rows, train_labels, strict=True):
        np.add.at(counts[label], row, 1)
    log_p = np.log(counts / counts.sum(axis=1, keepdims=True))
    prior = np.log(np.maximum(np.bincount(train_labels, minlength=len(counts)), 0.5))
    seen = ([index[w] for w in text.lower().split() if w in index] for text in texts)
    return np.array([(prior + log_p[:, row].sum(axis=1)).argmax() for row in seen], np.int32)


def interval(right: np.ndarray, *, seed: int = 0, draws: int = 2000, level: float = 0.95) -> tuple[float, float]:
    """The bootstrap's percentile interval of an accuracy: bool [n], resampled with replacement."""
    n = len(right)
    means = np.random.default_rng(seed).binomial(n, float(np.mean(right)), draws) / n  # of 0s and 1s only the sum is random
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
