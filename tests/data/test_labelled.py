"""Labelled rows of four shapes: what the columns hold, what is cut, and one clear line for every mistake."""

import numpy as np
import pytest

from jaxllm.core.types import UserError
from jaxllm.data import labelled, masking
from jaxllm.data import tokenizer as tokenizers

BYTE = tokenizers.byte_tokenizer()
FULL = masking.extended(BYTE)
CLS, SEP = FULL.specials["cls"], FULL.specials["sep"]


def encode(rows, length=32, tokenizer=FULL, names=None):
    return labelled.encode(tokenizer, rows, "rows.jsonl", length, names)


def text_of(tokens):
    return FULL.decode(tokens)


def test_a_text_is_framed_and_its_label_numbered():
    kind, got = encode([{"text": "good", "label": "yes"}, {"text": "bad one", "label": "no"}])
    assert kind == "sequence" and got.names == ("no", "yes") and got.columns["label"].tolist() == [1, 0]
    row = got.columns["tokens"][0]
    assert row[:6].tolist() == [CLS, *b"good", SEP] and not row[6:].any()
    assert got.columns["segments"][0].tolist() == [1] * 6 + [0] * 26
    assert got.texts == ["good", "bad one"] and (got.truncated, got.dropped) == (0, 0)


def test_a_decoders_tokenizer_has_no_class_token():
    _, got = encode([{"text": "ab", "label": 0}, {"text": "c", "label": 5}], tokenizer=BYTE)
    eos = BYTE.specials["eos"]
    assert got.columns["tokens"][:, :3].tolist() == [[97, 98, eos], [99, eos, 0]] and got.names == (0, 5)


def test_the_longer_text_of_a_pair_is_cut():
    rows = [
        {"text": "a" * 40, "text_b": "bb", "label": 0}, {"text": "aa", "text_b": "b" * 40, "label": 1},
        {"text": "a" * 40, "text_b": "b" * 40, "label": 1}, {"text": "a", "text_b": "b", "label": 1},
    ]  # fmt: skip
    _, got = encode(rows, length=13)
    texts = [(t == 97).sum() for t in got.columns["tokens"]], [(t == 98).sum() for t in got.columns["tokens"]]
    assert texts == ([8, 2, 5, 1], [2, 8, 5, 1]) and got.truncated == 3
    for tokens, types in zip(got.columns["tokens"], got.columns["types"], strict=True):
        assert (types[tokens == 97] == 0).all() and (types[tokens == 98] == 1).all()
        assert (tokens == SEP).sum() == 2 and tokens[0] == CLS


@pytest.mark.parametrize("length", [32, 9])
def test_a_words_first_piece_has_its_label(length):
    rows = [{"words": ["the", "dog", "ran"], "labels": ["D", "N", "V"]}, {"words": ["it"], "labels": ["N"]}]
    kind, got = encode(rows, length)
    assert kind == "token" and got.names == ("D", "N", "V")
    starts = [1, 4, 8] if length == 32 else [1, 4]  # "the", " dog", " ran"
    assert np.flatnonzero(got.columns["mask"][0]).tolist() == starts
    assert got.columns["labels"][0, starts].tolist() == [0, 1, 2][: len(starts)]
    assert np.flatnonzero(got.columns["mask"][1]).tolist() == [1] and got.columns["labels"][1, 1] == 1
    assert got.truncated == (length == 9)


@pytest.mark.parametrize(
    "answer,more,expected",
    [
        ("green door", {}, "green door."), ("the", {"start": 11}, "the"), ("She", {}, "She"), ("eed", {}, "freed"),
        ("the", {}, "the"),
    ],
)  # fmt: skip
def test_a_span_is_the_words_of_the_answer(answer, more, expected):
    context = "She freed   the cat by the green door."
    row = {"question": "where?", "context": context, "answer": answer, **more}
    if more:
        row["start"] = context.index("the")
    kind, got = encode([row], 64)
    start, end = got.columns["start"][0], got.columns["end"][0]
    assert kind == "span" and text_of(got.columns["tokens"][0, start : end + 1]).strip() == expected
    assert got.columns["types"][0, start] == 1


def test_spans_that_are_cut_off_are_left_out_and_counted():
    rows = [{"question": "q?", "context": "far " * 9 + "end", "answer": a} for a in ("far", "end")]
    _, got = encode(rows, 24)
    assert len(got.columns["tokens"]) == len(got.texts) == 1 and (got.dropped, got.truncated) == (1, 1)
    with pytest.raises(UserError, match="every answer lies beyond config.data.length=24"):
        encode(rows[1:], 24)


def test_choices_are_rows_of_a_group():
    rows = [
        {"text": "two and two", "choices": ["four", "five", "six"], "label": 0},
        {"text": "sky", "choices": ["blue", "red"], "label": 1},
    ]
    kind, got = encode(rows)
    assert kind == "choice" and got.columns["tokens"].shape == (2, 3, 32) and got.columns["label"].tolist() == [0, 1]
    row = got.columns["tokens"][0, 1]
    assert row[row != 0].tolist() == [CLS, *b"two and two", SEP, *b"five", SEP]
    assert not got.columns["segments"][1, 2].any() and got.columns["segments"][1, 1].any()


def test_held_out_rows_keep_the_names_of_training():
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "z"}]
    _, got = encode(rows, names=("x", "y", "z"))
    assert got.columns["label"].tolist() == [0, 2]
    with pytest.raises(UserError, match="row 2: label 'z' does not occur in training"):
        encode(rows, names=("x", "y"))


@pytest.mark.parametrize(
    "rows,message",
    [
        ([], "there are no rows"),
        ([{"text": "a"}], "row 1: no labelled row .its columns: text.*text, label"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": None}], "row 2: no column 'label', which rows.jsonl row 1 has"),
        ([{"text": "a", "label": 0.5}], "row 1: label 0.5 is a float"),
        ([{"text": "a", "label": True}], "row 1: label True is a bool"),
        ([{"text": "a", "label": 1}, {"text": "b", "label": "1"}], r"row 2: label '1' is not of the type of 1 \(rows.jsonl r"),
        ([{"text": "a", "label": 1}] * 2, "every label is 1: at least 2"),
        ([{"text": " ", "label": 1}, {"text": "b", "label": 2}], "row 1: text must be text that is not blank"),
        ([{"words": ["a", "b"], "labels": ["N"]}], "2 words and 1 labels"),
        ([{"words": "a b", "labels": ["N"]}], "must be lists"),
        ([{"question": "q", "context": "some text", "answer": "other"}], "'other' does not stand in the context"),
        ([{"question": "q", "context": "some text", "answer": "text", "start": 0}], "'text' does not stand in the context at 0"),
        ([{"text": "a", "choices": ["x"], "label": 0}], "2 texts or more"),
        ([{"text": "a", "choices": ["x", "y"], "label": 2}], "label 2 is no index of its 2 choices"),
    ],
)
def test_bad_rows_are_one_clear_line(rows, message):
    with pytest.raises(UserError, match=message) as error:
        encode(rows)
    assert "\n" not in str(error.value) and str(error.value).startswith("rows.jsonl")


def test_rows_with_a_place_each_are_named_by_it():
    rows = [{"words": ["a", "b", "c"], "labels": ["N", "O", "N"]}, {"words": ["d", "e"], "labels": ["N", 7]}]
    with pytest.raises(UserError, match=r"^rows.jsonl:9: label 7 is not of the type of 'N' \(rows.jsonl:4\)"):
        labelled.encode(FULL, rows, ["rows.jsonl:4", "rows.jsonl:9"], 32)
    rows[1]["labels"] = ["N", "X"]
    with pytest.raises(UserError, match="^rows.jsonl:9: label 'X' does not occur in training"):
        labelled.encode(FULL, rows, ["rows.jsonl:4", "rows.jsonl:9"], 32, ("N", "O"))


def test_a_length_without_room_is_refused():
    with pytest.raises(UserError, match="length=3 is too short for a row: 4"):
        encode([{"text": "a", "label": 0}, {"text": "b", "label": 1}], length=3)


def test_baselines():
    train, labels = ["red apple", "red car", "blue sky"], np.array([1, 1, 0])
    assert labelled.majority(labels, np.array([1, 0, 1, 1])) == 0.75
    got = labelled.bag_of_words(train, labels, ["a red sky apple", "blue blue", "nothing known"])
    assert got.tolist() == [1, 0, 1]
    rows = [{"text": t, "label": int(n)} for t, n in zip(train, labels, strict=True)]
    _, one = encode(rows)
    assert labelled.baselines("sequence", one, one) == {"majority": pytest.approx(2 / 3), "bag_of_words": 1.0}
    _, words = encode([{"words": ["a", "b", "c"], "labels": [1, 0, 1]}])
    assert labelled.baselines("token", words, words) == {"majority": pytest.approx(2 / 3)}
    # one word by hand: p(red | 1) = 3/9 against p(red | 0) = 1/7, priors 2 to 1
    assert labelled.bag_of_words(train, labels, ["red"]).tolist() == [1]


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    found = [labelled.interval(rng.random(200) < 0.7, seed=i, draws=400) for i in range(300)]
    covered = np.mean([low <= 0.7 <= high for low, high in found])
    assert 0.90 < covered < 0.99
    assert labelled.interval(np.ones(50, bool)) == (1.0, 1.0)
