"""Rankings and margins become one record, and say what is wrong with a row."""

import numpy as np
import pytest

from jaxllm.core.types import UserError
from jaxllm.data import pairs, ranked, tokenizer

BYTES = tokenizer.byte_tokenizer()
ROW = {"prompt": "Sky?", "ranked": ["Blue.", "Cyan.", "Green."]}
PAIR = {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green."}


def test_a_ranking_holds_what_pairs_of_it_hold():
    columns, report = ranked.encode_ranked(BYTES, [ROW, {"prompt": "2+2?", "ranked": ["4", "5"]}], 40)
    assert columns["valid"].tolist() == [[True, True, True], [True, True, False]] and "margin" not in columns
    assert {name: x.shape for name, x in columns["ranked"].items()} == dict.fromkeys(columns["ranked"], (2, 3, 40))
    for i, j in ((0, 1), (0, 2), (1, 2)):
        row = {"prompt": "Sky?", "chosen": ROW["ranked"][i], "rejected": ROW["ranked"][j]}
        pair, _ = pairs.encode_pairs(BYTES, [row], 40)
        for side, k in (("chosen", i), ("rejected", j)):
            for name, x in pair[side].items():
                np.testing.assert_array_equal(columns["ranked"][name][0, k], x[0])
    assert not columns["ranked"]["segments"][1, 2].any()
    assert report["rows"] == report["examples"] == 2 and report["completions_left_out"] == 0


def test_margins_come_along_and_pairs_come_back():
    rows = [{**PAIR, "margin": 1}, {"prompt": "x" * 60, "chosen": "a", "rejected": "b", "margin": 2}, {**PAIR, "margin": 0.5}]
    columns, report = ranked.encode_ranked(BYTES, rows, 40)
    np.testing.assert_array_equal(columns["margin"], [1, 0.5])  # the second is cut before its answer
    assert report["dropped"] == 1 and report["first_untrained"] == 1
    both = ranked.as_pairs(columns)
    expected, _ = pairs.encode_pairs(BYTES, [PAIR, PAIR], 40)
    assert set(both) == {"chosen", "rejected", "margin"}
    for side, record in expected.items():
        for name, x in record.items():
            np.testing.assert_array_equal(both[side][name], x)


def test_normalised_rows_pass_unchanged():
    for row in (ROW, PAIR, {**PAIR, "margin": 1.0}):
        once = ranked.normalise_ranked(row, "f row 1")
        assert ranked.normalise_ranked(once, "f row 1") == once
    assert ranked.is_ranked(ROW) and ranked.is_ranked({**PAIR, "margin": 0}) and not ranked.is_ranked(PAIR)
    assert not ranked.is_ranked("text") and not ranked.is_ranked({**PAIR, "margin": None})


def test_a_completion_that_does_not_fit_leaves_its_ranking():
    columns, report = ranked.encode_ranked(BYTES, [{"prompt": "p", "ranked": ["a", "b", ""]}], 40)
    assert columns["valid"].all()  # an empty answer still has its end token
    long = {"prompt": "x" * 40, "ranked": ["a", "b"]}
    columns, report = ranked.encode_ranked(BYTES, [long], 20)
    assert report["dropped"] == 1 and columns["valid"].shape == (0, 2)


@pytest.mark.parametrize(
    "row,words",
    [
        ({"prompt": "p", "ranked": ["a"]}, "f row 3: `ranked` must be a list of at least two"),
        ({"prompt": "p", "ranked": "ab"}, "at least two"),
        ({"ranked": ["a", "b"]}, "no `prompt`"),
        ({"prompt": "p", "ranked": ["a", 3]}, "f row 3, ranked 2"),
        ({**PAIR, "margin": "big"}, "margin='big' must be a number"),
        ({**PAIR, "margin": -1}, "margin=-1"),
        ({**PAIR, "margin": float("nan")}, "margin=nan"),
    ],
)
def test_bad_rows_are_named(row, words):
    with pytest.raises(UserError, match=words):
        ranked.normalise_ranked(row, "f row 3")


def test_margins_in_some_rows_only_are_refused():
    with pytest.raises(UserError, match="ranking 2 is no pair with a margin, but ranking 1 has one"):
        ranked.encode_ranked(BYTES, [{**PAIR, "margin": 1}, PAIR], 40)
