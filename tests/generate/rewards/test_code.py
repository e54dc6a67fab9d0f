"""The reward for programs: what is compared and how, what is excluded, and what a row must have."""

import time

import numpy as np
import pytest

from experiments import verifiable
from jaxllm.core.types import UserError
from jaxllm.data import problems
from jaxllm.generate.rewards import code, combine
from jaxllm.generate.sandbox.runner import CodeRunner, Outcome
from tests.experiments.conftest import write_rows

ROW = {"function": "f", "tests": [{"input": [1], "output": 2}, {"input": 3, "output": 6}]}


def ended(*values, kind="ended", reason=""):
    return Outcome(kind, tuple(values), "", "", 0, reason)


def scripted(outcomes):
    """A runner that tells prepared outcomes by the source, and the inputs that it was given."""
    seen = []

    def call(source, function, inputs):
        seen.append((source, function, list(inputs)))
        return outcomes[source]

    return CodeRunner("scripted", call, lambda source, stdin: outcomes[source]), seen


def test_only_inputs_go_in():
    made, seen = scripted({"x": ended((2, ""), (6, ""))})
    assert code.judge(made, {**ROW, "completion": "x"}).value == 1.0
    assert seen == [("x", "f", [[1], 3])]


def test_failures_are_excluded_and_time_outs_counted_apart():
    outcomes = {
        "good": ended((2, ""), (6, "")), "bad": ended((2, ""), (7, "")), "raises": ended((2, ""), (None, "ValueError: x")),
        "slow": ended(kind="timeout"), "loud": ended(kind="overflow"), "gone": ended(kind="failure", reason="no python"),
    }  # fmt: skip
    made, _ = scripted(outcomes)
    rows = [{**ROW, "completion": name} for name in outcomes]
    scores = combine.run({"code": code.reward(made)}, rows)
    np.testing.assert_array_equal(scores.values, [1, 0, 0, 0, 0, np.nan])
    assert scores.valid.tolist() == [True] * 5 + [False] and scores.failures == {"code": 1}
    assert scores.reasons == {"code": "row 6: no python"} and scores.counts == {"code/timeouts": 1}
    found = combine.metrics(combine.joined([scores, scores]))
    assert found["rewards/code/timeouts"] == (2.0, 1.0) and found["rewards/excluded"] == (2.0, 1.0)
    assert found["rewards/code/mean"] == (2.0, 10.0)


@pytest.mark.parametrize(
    "got,want,equal",
    [
        (5, 5, True), (5.0, 5, True), (5, 5.0, True), (True, 1, False), (1, True, False), (0, False, False), (None, 0, False),
        (0.1 + 0.2, 0.3, True), (0.31, 0.3, False), (10**400, 1.0, False), (float("inf"), 1e308, False), ("5", 5, False),
        ([1, [2]], [1, [2]], True), ([2, 1], [1, 2], False), ([1], [1, 2], False), ({"a": 1}, {"a": 1.0}, True),
        ({"a": 1, "b": 2}, {"a": 1}, False), ("a", "a", True), ("a", "A", False), (None, None, True), ([], {}, False),
        (10**20 + 1, 10**20, False), (1e20, 10**20, True),
    ],
)  # fmt: skip
def test_values_are_compared_as_json(got, want, equal):
    assert code.same(got, want) is equal


def test_the_last_block_is_the_answer():
    assert code.extract("```python\na\n```\ntext\n```\nb\n```") == "b\n"
    assert code.extract("a = 1") == "a = 1"
    # what closes a block in another language opens no program
    assert code.extract("It prints:\n```text\n3\n```\nSo:\n```Python\nb\n```\nDone:\n```json\n3\n```") == "b\n"
    assert code.extract("```python\na\n") == "```python\na\n"


def test_a_text_of_fences_takes_linear_time():
    begun = time.process_time()
    code.extract("```python\n" * 100_000)
    assert time.process_time() - begun < 2


def test_what_is_too_long_is_not_run():
    made, seen = scripted({})
    assert code.judge(made, {**ROW, "completion": "x" * (code.LONGEST + 1)}).value == 0.0 and not seen


@pytest.mark.parametrize(
    "row,words",
    [
        ({"tests": []}, "at least one"),
        ({"tests": "x"}, "must be a list"),
        ({"tests": [{"input": 1}]}, "test 1 must be"),
        ({"tests": [{"input": [1], "output": 2}]}, "to call one, give `function`"),
        ({"tests": [{"input": 1, "output": 2}], "function": "a b"}, "'a b': give the name"),
    ],
)
def test_rows_that_cannot_be_tested_are_named(row, words):
    with pytest.raises(UserError, match=f"^f row 1: .*{words}"):
        code.check_tests(row, "f row 1")


def test_a_file_of_problems_with_tests(tmp_path):
    rows = [{"prompt": "Double a number.", **ROW}, {"prompt": "Halve it.", **ROW, "solution": "def f(x): return x"}]
    tasks = verifiable.load_tasks(write_rows(tmp_path / "rows.jsonl", rows), 0, 0)
    assert verifiable.default_reward(tasks) == "code" and tasks.solutions == ["", "def f(x): return x"]
    for name in ("exact", "numeric"):
        with pytest.raises(UserError, match="rows.jsonl:1"):
            verifiable.parse_rewards(name, tasks)
    with pytest.raises(UserError, match="say unsafe_local"):
        verifiable.parse_rewards("code:rlimits", tasks)
    with pytest.raises(UserError, match="`solution` is a int"):
        problems.problem({"prompt": "p", "tests": [], "solution": 3}, "row")


def test_programs_are_scored_by_name(tmp_path):
    tasks = verifiable.load_tasks(write_rows(tmp_path / "rows.jsonl", [{"prompt": "Double it.", **ROW}] * 3), 0, 0)
    try:
        functions, weights = verifiable.parse_rewards("code + 0.1*ended", tasks)
    except UserError as error:
        pytest.skip(str(error))
    texts = ["```python\ndef f(x):\n    return 2 * x\n```", "def f(x):\n    return x", "2"]
    scores = verifiable.score_texts(functions, weights, tasks.rows, texts, [True] * 3, [5] * 3)
    np.testing.assert_allclose(scores.values, [1.1, 0.1, 0.1])
    assert scores.counts == {"code/timeouts": 0}
