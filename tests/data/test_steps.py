"""Steps with labels: where each is judged, and what is wrong with a row."""

import numpy as np
import pytest

from jaxllm.core.types import UserError
from jaxllm.data import chat, steps, tokenizer

BYTES = tokenizer.byte_tokenizer()
ROW = {"prompt": "2+3*2?", "completions": ["3*2 = 6", "2+6 = 9", "9"], "labels": [True, False, False]}


def test_each_step_is_judged_at_the_line_end_that_closes_it():
    columns, report = steps.encode_steps(BYTES, [ROW], 80)
    tokens, ends = columns["record"]["tokens"][0], columns["step_ends"][0]
    prompt = len(chat.prompt_ids(BYTES, "2+3*2?"))
    np.testing.assert_array_equal(tokens[:prompt], chat.prompt_ids(BYTES, "2+3*2?"))
    used = int(columns["record"]["segments"].sum())
    assert BYTES.decode(tokens[prompt:used].tolist()) == "3*2 = 6\n2+6 = 9\n9\n"
    at = np.flatnonzero(ends)
    assert at.tolist() == [prompt + 7, prompt + 15, prompt + 17]
    assert columns["step_labels"][0, at].tolist() == ROW["labels"] and not columns["step_labels"][0, ~ends].any()
    assert report["steps"] == 3 and report["steps_cut"] == 0 and report["rows"] == 1


def test_cut_steps_and_dropped_rows_are_counted():
    prompt = len(chat.prompt_ids(BYTES, "2+3*2?"))
    columns, report = steps.encode_steps(BYTES, [ROW, {**ROW, "prompt": "long " * 20}], prompt + 10)
    assert columns["step_ends"].sum() == 1 and report["steps_cut"] == 5
    assert report["dropped"] == report["untrained"] == 1 and report["first_untrained"] == 1 and report["truncated"] == 1


@pytest.mark.parametrize(
    "change,words",
    [
        ({"labels": [True]}, "3 steps in `completions` and 1 `labels`"),
        ({"labels": [1, 0, 2]}, "the label 2 must be true"),
        ({"completions": "3*2 = 6"}, "must be a list of steps"),
        ({"labels": None}, "has no `labels`"),
    ],
)
def test_bad_rows_are_named(change, words):
    with pytest.raises(UserError, match=f"f row 2.*{words}"):
        steps.normalise_steps({**ROW, **change}, "f row 2")
