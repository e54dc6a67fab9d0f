"""Text-to-text tasks: answers against their own rules, disjoint splits, determinism."""

import hashlib
import json

import pytest

from jaxllm.core.types import UserError
from jaxllm.worlds import instr_words as words
from jaxllm.worlds import text2text

TRAIN = {name: text2text.rows(name, "train", 400, seed=1) for name in text2text.TASKS}
TESTS = {name: text2text.rows(name, "test", 60, seed=1) for name in text2text.TASKS}
ALL = {name: TRAIN[name] + TESTS[name] for name in TRAIN}


def test_answers():
    for row in ALL["copy"]:
        assert row["target"] == row["input"]
    for row in ALL["reverse"]:
        assert row["target"].split() == row["input"].split()[::-1]
    for row in ALL["add"]:
        assert int(row["target"]) == sum(int(n) for n in row["input"].split(" plus "))
    for row in ALL["opposite"]:
        assert [words.OPPOSITE_OF[word] for word in row["input"].split()] == row["target"].split()
    for row in ALL["sentiment"]:
        wanted = (row["input"].split()[-1] in text2text.LIKED) != (" not " in row["input"])
        assert row["target"] == ("positive" if wanted else "negative")


def test_the_translation_is_a_language():
    """A word has one translation, two words never the same, and adjectives stand behind their nouns."""
    lexicon = {word: text2text.foreign(word) for word in words.COLOURS + words.ANIMALS}
    assert len(set(lexicon.values())) == len(lexicon) and "e" not in lexicon.values()
    for row in ALL["translate English to Ranu"]:
        parts = [part.split() for part in row["input"].split(" and ")]
        assert row["target"] == " e ".join(f"{lexicon[noun]} {lexicon[colour]}" for colour, noun in parts)


@pytest.mark.parametrize("task", text2text.TASKS)
def test_splits_are_disjoint_and_tests_do_not_repeat(task):
    train, test = {r["input"] for r in TRAIN[task]}, [r["input"] for r in TESTS[task]]
    assert not train & set(test) and len(set(test)) == 60
    assert all(r["task"] == task for r in ALL[task])
    if task == "add":
        sums = {frozenset(r["input"].split(" plus ")) for r in TRAIN[task]}
        assert not sums & {frozenset(t.split(" plus ")) for t in test}


def test_the_seed_alone_decides():
    digest = hashlib.sha256(json.dumps(text2text.mixture("train", seed=3, sizes={"copy": 5, "add": 5})).encode()).hexdigest()
    assert digest[:16] == "b1a442370efc101e"
    assert text2text.rows("copy", "train", 9, seed=1) == TRAIN["copy"][:9] != text2text.rows("copy", "train", 9, seed=2)
    assert {name: len(rows) for name, rows in text2text.mixture("test", seed=0, sizes={"add": 3}).items()} == {"add": 3}


def test_unknown_names_are_said():
    with pytest.raises(UserError, match="task 'summarise'.*choose among question"):
        text2text.rows("summarise", "train", 1, seed=0)
    with pytest.raises(UserError, match="split 'tune'.*train, test"):
        text2text.rows("copy", "tune", 1, seed=0)
