"""Rows with a known answer, in their shapes, and where other rows are sent."""

import json

import pytest

from jaxllm.core.types import UserError
from jaxllm.data import problems
from tests.conftest import shared_data

USER = [{"role": "user", "content": "1+1?"}]


def test_a_row_of_gsm8k():
    row = {"question": "How many?", "answer": "48/2 = <<48/2=24>>24 in May.\n48+24 = <<48+24=72>>72 in all.\n#### 72"}
    found = problems.problem(row, "x")
    assert found.prompt == [{"role": "user", "content": "How many?"}] and found.gold == "72"
    assert found.solution == "48/2 = 24 in May.\n48+24 = 72 in all.\n#### 72" and found.row == row


@pytest.mark.parametrize(
    "row,solution",
    [
        ({"prompt": "1+1?", "answer": "2"}, ""),
        ({"prompt": USER, "answer": 2}, ""),
        ({"problem": "1+1?", "gold": " 2 ", "answer": "not this"}, ""),
        ({"messages": USER, "answer": "2"}, ""),
        ({"messages": [*USER, {"role": "assistant", "content": "it is 2"}], "answer": "2"}, "it is 2"),
    ],
)
def test_other_shapes(row, solution):
    found = problems.problem(row, "x")
    assert (found.prompt, found.gold, found.solution) == (USER, "2", solution)


def test_annotations_are_taken_out_and_nothing_else():
    assert problems.without_annotations("a <<1+1=2>>2 << b >> c<d") == "a 2  c<d"
    assert problems.without_annotations("1 << 2\n>> 3") == "1 << 2\n>> 3"
    assert problems.split_solution("#### 5") == ("5", "#### 5")


@pytest.mark.parametrize(
    "row,words",
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, r"f row 1 looks like preference data .*experiments.dpo"),
        ({"prompt": "a", "completion": "b"}, "looks like SFT data .*experiments.sft"),
        ({"messages": USER}, "looks like SFT data .*experiments.sft"),
        ({"prompt": "a", "completion": "b", "label": True}, "experiments.kto"),
        ({"text": "a"}, "experiments.pretrain"),
        ({"prompt": "a"}, "has `prompt` but no `answer`"),
        ({"question": "a", "anser": "b"}, "has `question` but no `answer`"),
        ({"id": 1}, r"needs `question` \(or `prompt`\) and `answer`"),
        ({"prompt": "a", "answer": "work ####  "}, "`answer` is empty after ####"),
        ({"prompt": "a", "answer": ""}, "`answer` is empty"),
        ({"prompt": "a", "answer": ["2"]}, "`answer` is a list"),
        ({"prompt": "a", "answer": True}, "`answer` is a bool"),
        ({"prompt": [{"role": "usr", "content": "a"}], "answer": "2"}, 'unknown role "usr"'),
        (["a"], "is a list"),
    ],
)
def test_other_rows_are_named(row, words):
    with pytest.raises(UserError, match=words) as error:
        problems.problem(row, "f row 1")
    assert "\n" not in str(error.value)


def test_files(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "answer": "1"}\n{"prompt": "a"}\n')
    with pytest.raises(UserError, match=r"rows.jsonl:2 has `prompt`"):
        problems.read_problems(path)


def test_the_real_rows():
    path = shared_data("math/gsm8k.train.jsonl")
    found = problems.read_problems(path)
    assert len(found) == 7473
    assert not any("<<" in p.solution or ">>" in p.solution for p in found)
    for p, line in zip(found, path.read_text(encoding="utf-8").splitlines(), strict=True):
        row = json.loads(line)
        assert p.solution.endswith(f"#### {p.gold}") and row["answer"].endswith(f"#### {p.gold}")
