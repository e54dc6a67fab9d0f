"""Labelled completions: every shape of row, the mismatched column, and messages about other kinds of data."""

import numpy as np
import pytest

from jaxllm.core.types import UserError
from jaxllm.data import tokenizer
from jaxllm.data.unpaired import encode_unpaired, mismatches, normalise_rows

BYTES = tokenizer.byte_tokenizer()


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


GOOD = {"prompt": [user("q")], "completion": [said("a")], "label": True}


@pytest.mark.parametrize("row", [
    {"prompt": "q", "completion": "a", "label": True}, {"prompt": [user("q")], "completion": "a", "label": 1},
    {"prompt": "q", "completion": [said("a")], "label": np.bool_(True), "other": 3}, GOOD,
    {"prompt": "\n\nHuman: q\n\nAssistant:", "completion": "a", "label": True},
    {"prompt": "q", "completion": [user("q"), said("a")], "label": True},
])  # fmt: skip
def test_every_shape_of_row(row):
    assert normalise_rows(row, "f:1") == [GOOD]
    assert normalise_rows(GOOD, "f:1") == [GOOD]


def test_a_row_without_a_prompt():
    assert normalise_rows({"completion": "a", "label": False}, "f:1") == [
        {"prompt": [], "completion": [said("a")], "label": False}
    ]


@pytest.mark.parametrize("pair", [
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
])  # fmt: skip
def test_a_pair_gives_two_rows(pair):
    assert normalise_rows(pair, "f:1") == [GOOD, {"prompt": [user("q")], "completion": [said("b")], "label": False}]


BAD_ROWS = [
    ({"messages": [said("x")]}, ["looks like SFT data (columns: messages)", "experiments.sft", "`label`"]),
    ({"prompt": "p", "completion": "c"}, ["looks like SFT data (columns: prompt, completion)", "experiments.sft"]),
    ({"text": "t"}, ["`text`", "experiments.pretrain"]),
    ({"prompt": "p", "label": True}, ["has no `completion`", "columns are prompt, label"]),
    ({"prompt": "p", "chosen": "c"}, ["has no `rejected`"]),
    ({"prompt": "p", "completion": "c", "label": "good"}, ["label 'good'", "true", "false"]),
    ({"prompt": "p", "completion": "c", "label": 0.5}, ["label '0.5'"]),
    ({"prompt": "p", "completion": [user("c")], "label": True}, ["completion", "role user"]),
    ({"prompt": 3, "completion": "c", "label": True}, ["prompt", "int"]),
    ([], ["is a list"]),
]


@pytest.mark.parametrize(("row", "words"), BAD_ROWS, ids=[w[0][:30] for _, w in BAD_ROWS])
def test_bad_rows_are_one_line_that_names_the_row_and_the_fix(row, words):
    with pytest.raises(UserError) as error:
        normalise_rows(row, "rows.jsonl:4")
    message = str(error.value)
    assert message.startswith("rows.jsonl:4") and "\n" not in message
    assert [w for w in words if w not in message] == []


def test_mismatches_have_another_prompt():
    assert mismatches(list("aabbc")).tolist() == [2, 2, 4, 4, 0]
    assert mismatches(list("abba")).tolist() == [1, 3, 3, 1]
    assert mismatches(list("aaa")).tolist() == [1, 2, 0]
    assert mismatches(["a"]).tolist() == [0] and mismatches([]).tolist() == []
    rng = np.random.default_rng(0)
    for _ in range(20):
        prompts = rng.integers(0, 3, 12).tolist()
        for i, j in enumerate(mismatches(prompts)):
            ahead = [k % 12 for k in range(i + 1, i + 12) if prompts[k % 12] != prompts[i]]
            assert j == ahead[0]


def spelt(record, row):
    ids = record["targets"][row][record["mask"][row]].tolist()
    return "".join("<end>" if i == BYTES.specials["end"] else chr(i) for i in ids)


def asked(record, row):
    return "".join(chr(i) for i in record["tokens"][row] if 32 < i < 127)


def test_columns_and_report():
    rows = [{"prompt": "q", "chosen": "yes", "rejected": "no"}, {"prompt": "r", "completion": "maybe", "label": True},
            {"prompt": "s" * 60, "completion": "lost", "label": False}]  # fmt: skip
    columns, report = encode_unpaired(BYTES, rows, 24)
    assert columns["label"].tolist() == [True, False, True]
    assert [spelt(columns["completion"], i) for i in range(3)] == ["yes<end>", "no<end>", "maybe<end>"]
    assert [spelt(columns["mismatched"], i) for i in range(3)] == ["maybe<end>", "maybe<end>", "yes<end>"]
    assert [asked(columns["mismatched"], i)[0] for i in range(3)] == ["q", "q", "r"]
    assert columns["completion"]["tokens"].shape == columns["mismatched"]["tokens"].shape == (3, 24)
    assert (report["examples"], report["rows"], report["dropped"], report["first_untrained"]) == (4, 3, 1, 3)
    assert (report["good"], report["bad"]) == (2, 1)


def test_nothing_of_the_prompt_is_trained():
    row = {"prompt": [user("q"), said("old"), user("r")], "completion": "new", "label": True}
    columns, _ = encode_unpaired(BYTES, [row], 48)
    assert spelt(columns["completion"], 0) == "new<end>"
