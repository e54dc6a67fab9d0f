"""Rewards by name, and where tasks come from: without a model."""

import numpy as np
import pytest

from experiments import verifiable
from jaxllm.core.types import UserError
from jaxllm.generate.rewards import combine
from tests.experiments.conftest import write_rows


@pytest.fixture
def tasks(tmp_path):
    rows = [{"question": f"{i}?", "answer": f"work\n#### {i}", "level": "easy"} for i in range(20)]
    yield verifiable.load_tasks(write_rows(tmp_path / "rows.jsonl", rows), 5, 0)
    combine.stop()


def score(spec, tasks, texts, ended=True, length=5):
    functions, weights = verifiable.parse_rewards(spec, tasks)
    n = len(texts)
    return verifiable.score_texts(functions, weights, tasks.rows[:n], texts, [ended] * n, [length] * n)


def test_a_file_is_read_whole_with_its_columns(tasks):
    assert len(tasks.rows) == 20 and tasks.rows[3]["gold"] == "3" and tasks.rows[3]["level"] == "easy"
    assert tasks.solutions[3] == "work\n#### 3" and verifiable.default_reward(tasks) == "numeric"


def test_a_part_is_held_out(tasks):
    class Config:
        class data:
            path = tasks.where
            on_error = "stop"

        seed = 0

    train, held_out = verifiable.split_tasks(Config, None, 0, 128)
    assert len(train.rows) == 18 and len(held_out.rows) == 2
    assert {r["gold"] for r in train.rows} | {r["gold"] for r in held_out.rows} == {str(i) for i in range(20)}


def test_names_weights_and_arguments(tasks):
    spec = r"numeric + 0.5*format:it is \d+\.? + -2 * length:5 + ended + repetition"
    found = score(spec, tasks, ["it is 0.", "#### 7"])
    # readable is reported beside numeric, and weighs nothing
    assert list(found.columns) == ["numeric", "format", "length", "ended", "repetition", "readable"]
    assert found.columns["readable"].tolist() == [1.0, 1.0]
    np.testing.assert_allclose(found.values, [1 + 0.5 - 2 + 1, 0 + 0 - 2 + 1])
    np.testing.assert_allclose(score("abstention", tasks, ["0", "I think 7", "I don't know"]).values, [1, -2, 0])
    np.testing.assert_allclose(score("exact", tasks, ["#### 0", "x"]).values, [1, 0])


def test_the_instr_world_has_its_own():
    tasks = verifiable.load_tasks("", 6, 0)
    found = score("", tasks, [row["gold"] for row in tasks.rows])
    assert verifiable.default_reward(tasks) == "gold" and list(found.columns) == ["gold"]
    np.testing.assert_allclose(found.values, 1)
    plain = [i for i, row in enumerate(tasks.rows) if row["task"]["kind"] != "unsafe"]
    exact = score("exact", tasks, [row["gold"] for row in tasks.rows])
    np.testing.assert_allclose(exact.values[plain], 1)


def test_a_pattern_that_never_ends_excludes_its_rows(tasks, monkeypatch):
    monkeypatch.setattr(verifiable, "SECONDS", 0.5)
    found = score("numeric + format:(a|aa)+b", tasks, ["a" * 200, "aab"])
    assert found.valid.tolist() == [False, True] and "took over 0.5 seconds" in found.reasons["format"]


@pytest.mark.parametrize(
    "spec,words",
    [
        ("numerc", "'numerc' is no reward; there are numeric"),
        ("gold", "use numeric or exact"),
        ("numeric + 2*numeric", "'numeric' twice"),
        ("1.2.3*numeric", "'1.2.3' is no weight"),
        ("length", "'length' is no reward"),
        ("length:x", "is no reward"),
        ("nowhere.py:f", "no such file"),
    ],
)
def test_bad_names_are_one_line(tasks, spec, words):
    with pytest.raises(UserError, match=words) as error:
        verifiable.parse_rewards(spec, tasks)
    assert "\n" not in str(error.value)


def test_answers_that_are_no_numbers(tmp_path):
    path = write_rows(tmp_path / "words.jsonl", [{"prompt": "a", "answer": "3"}, {"prompt": "b", "answer": "blue"}])
    tasks = verifiable.load_tasks(path, 0, 0)
    assert verifiable.default_reward(tasks) == "exact"
    with pytest.raises(UserError, match="words.jsonl:2: the answer 'blue' is no number"):
        verifiable.parse_rewards("numeric", tasks)
