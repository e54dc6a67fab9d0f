"""Rewards over a batch: weights, and functions that raise, hang, die or give what is no number."""

import os
import signal
import time

import numpy as np
import pytest

from jaxllm.core.types import UserError
from jaxllm.generate.rewards import combine
from jaxllm.generate.rewards.combine import Batched, External

ROWS = [{"prompt": "p", "completion": c, "gold": "1"} for c in ("a", "bb", "ccc", "dddd")]
PLANTED = """
import math, os, time
print("a module may print")

def length(row, scale=1.0):
    print("so may a function", flush=True)
    return scale * len(row["completion"])

def raises(row):
    if row["completion"] == "bb":
        raise RuntimeError("planted\\nin two lines")
    return 1

def hangs(row):
    if row["completion"] == "bb":
        while True:
            pass
    return 1

def always_hangs(row):
    time.sleep(1000)

def dies(row):
    if row["completion"] == "ccc":
        os._exit(3)
    return 1

def odd(row):
    return {"a": math.nan, "bb": math.inf, "ccc": None, "dddd": "7"}[row["completion"]]
"""


@pytest.fixture
def planted(tmp_path):
    path = tmp_path / "user.py"
    path.write_text(PLANTED)
    yield str(path)
    combine.stop()


def length(row):
    return len(row["completion"])


def test_weights_add_up():
    scores = combine.run({"length": length, "one": lambda row: True}, ROWS, weights={"length": 0.5})
    np.testing.assert_allclose(scores.values, [1.5, 2, 2.5, 3])
    assert scores.values.dtype == np.float32 and scores.valid.all() and scores.failures == {"length": 0, "one": 0}
    assert combine.describe(scores) == []
    assert combine.metrics(scores)["rewards/length/mean"] == (10, 4)


@pytest.mark.parametrize(
    "name,row,words", [("raises", 1, "row 2: RuntimeError: planted in two lines"), ("dies", 2, "row 3: its process ended")]
)
def test_a_failure_excludes_its_row_and_is_named(planted, name, row, words):
    functions = {"length": length, name: External(planted, name)}
    scores = combine.run(functions, ROWS, seconds=20)
    good = np.arange(4) != row
    np.testing.assert_array_equal(scores.valid, good)
    assert np.isnan(scores.values[row]) and np.isfinite(scores.values[good]).all()
    assert scores.failures == {"length": 0, name: 1} and words in combine.describe(scores)[0]
    assert combine.metrics(scores)["rewards/excluded"][0] == 1 and combine.metrics(scores)[f"rewards/{name}/failures"][0] == 1


def test_a_function_that_hangs_does_not_hang_training(planted):
    scores = combine.run({"hangs": External(planted, "hangs")}, ROWS, seconds=1.0)
    assert scores.valid.tolist() == [True, False, True, True]
    assert "row 2: took over 1 seconds" in scores.reasons["hangs"]


def test_one_that_always_hangs_is_given_up(planted):
    start = time.monotonic()
    scores = combine.run({"always_hangs": External(planted, "always_hangs")}, ROWS * 500, seconds=0.3)
    assert time.monotonic() - start < 120, "2000 calls of 0.3 seconds would be ten minutes"
    assert not scores.valid.any() and scores.failures == {"always_hangs": 2000}


def test_what_is_no_finite_number_is_a_failure(planted):
    odd = {"a": np.nan, "bb": np.inf, "ccc": None, "dddd": "7"}
    for function in (External(planted, "odd"), lambda row: odd[row["completion"]]):
        scores = combine.run({"odd": function}, ROWS)
        assert not scores.valid.any() and scores.failures == {"odd": 4} and np.isnan(scores.values).all()
    assert "no finite number" in scores.reasons["odd"]


def test_functions_of_ours_may_fail_too():
    def picky(row):
        if row["completion"] == "a":
            raise ValueError("no")
        return 1.0

    scores = combine.run({"picky": picky}, ROWS)
    assert scores.valid.tolist() == [False, True, True, True] and scores.failures == {"picky": 1}


def test_a_reward_model_is_a_batched_function():
    scores = combine.run({"model": Batched(lambda rows: np.array([1, np.nan, 3, 4])), "length": length}, ROWS)
    np.testing.assert_allclose(scores.values, [2, np.nan, 6, 8])
    assert scores.failures == {"model": 1, "length": 0}
    with pytest.raises(UserError, match=r"shape \(1,\) for 4 rows"):
        combine.run({"model": Batched(lambda rows: np.ones(1))}, ROWS)


def test_options_and_printing_pass_through_a_worker(planted):
    scores = combine.run({"length": External(planted, "length", {"scale": 2.0})}, ROWS, seconds=20)
    np.testing.assert_allclose(scores.values, [2, 4, 6, 8])


def test_a_function_from_a_module_with_a_catastrophic_pattern():
    slow = External("jaxllm.generate.rewards.text", "format_match", {"pattern": "(a+)+b"})
    module_level = External("operator", "length_hint")
    with pytest.raises(UserError, match="does not load"):
        combine.check({"x": External("operator", "nothing_of_this_name")})
    combine.check({"x": module_level})
    # format_match takes text, not rows: what a function raises is counted
    assert combine.run({"slow": slow}, ROWS[:1], seconds=60).failures == {"slow": 1}
    combine.stop()


def test_files_that_do_not_load_are_said_before_training(tmp_path, planted):
    with pytest.raises(UserError, match="no such file"):
        combine.check({"x": External(str(tmp_path / "nowhere.py"))})
    with pytest.raises(UserError, match="'missing' does not load: AttributeError"):
        combine.check({"x": External(planted, "missing")})
    broken = tmp_path / "broken.py"
    broken.write_text("def reward(row:")
    with pytest.raises(UserError, match="SyntaxError"):
        combine.check({"x": External(str(broken))})


def test_weights_without_a_function_are_refused():
    with pytest.raises(UserError, match="'lenght': no such reward function; there are length"):
        combine.run({"length": length}, ROWS, weights={"lenght": 1.0})
    with pytest.raises(UserError, match="finite"):
        combine.run({"length": length}, ROWS, weights={"length": float("nan")})
    with pytest.raises(UserError, match="at least one"):
        combine.run({}, ROWS)


def test_a_worker_killed_from_outside_is_replaced(planted):
    function = {"length": External(planted, "length")}
    combine.run(function, ROWS, seconds=20)
    (worker,) = combine._workers.values()
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    assert combine.run(function, ROWS, seconds=20).valid.tolist() == [False, True, True, True]


FLOOD = """
def floods(row):
    block = "x" * (1 << 20)
    for _ in range(1024):
        print(block)
    return 1
"""


def test_a_gigabyte_of_printing_is_dropped(tmp_path, capfd):
    (tmp_path / "user.py").write_text(FLOOD)
    scores = combine.run({"floods": External(str(tmp_path / "user.py"), "floods")}, ROWS[:1], seconds=60)
    combine.stop()
    assert scores.valid.tolist() == [True] and scores.values[0] == 1, scores.reasons
    shown = capfd.readouterr().err
    assert len(shown) < 100_000 and "prints on: the rest is dropped" in shown


def test_what_else_is_written_where_answers_go_is_no_answer(tmp_path):
    # replies have a descriptor of their own, which a function of this process may find
    source = "import os\n\ndef reward(row):\n    for fd in range(3, 20):\n        try:\n            os.write(fd, {})\n"
    source += "        except OSError:\n            pass\n    return 1\n"
    for content, said in (("b'no JSON' + bytes([10])", "its answer is none"), ("b'y' * 200_000", "more than 65536 bytes")):
        (tmp_path / "user.py").write_text(source.format(content))
        scores = combine.run({"own": External(str(tmp_path / "user.py"))}, ROWS[:1], seconds=20)
        combine.stop()
        assert not scores.valid.any() and said in scores.reasons["own"]
