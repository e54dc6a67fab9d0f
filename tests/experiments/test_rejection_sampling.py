"""Expert iteration and best of n on a tiny model: what is kept, what is trained from, what is counted."""

import json
import math

import pytest

from experiments import rejection_sampling
from jaxllm import launch
from jaxllm.core.types import UserError
from tests.experiments.conftest import write_rows
from tests.experiments.test_stages import metrics_of, moved, params_of

SMALL = {"rounds": 2, "samples": 4, "steps": 2, "batch_size": 4, "sample_batch": 32, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    root = tmp_path_factory.mktemp("problems")
    (root / "mine.py").write_text(
        "def short(row):\n    return float(len(row['completion']) < 6)\n"
        "def never(row):\n    return 0.0\n"
        "def raises(row):\n    if row['prompt'] == 'say 3':\n        raise ValueError('planted')\n    return 1.0\n"
    )
    rows = [{"prompt": f"say {i}", "answer": str(i)} for i in range(20)]
    return write_rows(root / "rows.jsonl", rows), str(root / "mine.py")


def start(base, problems, workdir, reward, **overrides):
    given = {**SMALL, "init": str(base), "data.path": problems[0], "rewards": reward.format(problems[1]), **overrides}
    return launch.start(rejection_sampling.main, "rejection_sampling", given, workdir)["metrics"]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("train_from", ["base", "latest"])
def test_rounds_train_on_the_right_rows(base, problems, tmp_path, train_from):
    # the end token is rare in a model of three steps: what counts as right is any text, and so many rounds have rows
    metrics = start(base, problems, tmp_path / "run", "1*ended", train_from=train_from, select="every", samples=16)
    rounds = metrics_of(tmp_path / "run")
    assert [m["step"] for m in rounds] == [1, 2]
    for m in rounds:
        assert 0 <= m["round/accuracy"] <= m["round/coverage"] <= 1 and m["round/mean_length"] <= 8
        assert 0 <= m["round/held_out_accuracy"] <= 1
    assert rounds[1]["round/never_solved"] <= rounds[0]["round/never_solved"]
    assert "eval/accuracy_start" in metrics and "round2/coverage" in metrics
    if rounds[0]["round/rows"] >= 2:
        rows = read(tmp_path / "run" / "data" / "round1.jsonl")
        assert len(rows) == rounds[0]["round/rows"] and rows[0]["messages"][-1]["role"] == "assistant"
        assert moved(params_of(base / "sft", "policy"), params_of(tmp_path / "run" / "round1", "policy")) > 0
        given = json.loads((tmp_path / "run" / "round1" / "config.json").read_text())["init"]
        assert given == f"{base / 'sft'}@3", "rounds start from the fine-tuned model, not from the pretrained one"
        if rounds[1]["round/rows"] >= 2:
            given = json.loads((tmp_path / "run" / "round2" / "config.json").read_text())["init"]
            assert given.endswith("round1") == (train_from == "latest")


def test_what_is_never_solved_is_counted_and_nothing_is_trained(base, problems, tmp_path):
    metrics = start(base, problems, tmp_path / "run", "{}:never")
    assert metrics["round2/never_solved"] == 18 and metrics["round2/rows"] == metrics["round2/coverage"] == 0
    assert not (tmp_path / "run" / "round1").exists() and all(math.isfinite(v) for v in metrics.values())


def test_failures_are_no_wrong_answers(base, problems, tmp_path):
    metrics = start(base, problems, tmp_path / "run", "{}:raises", rounds=1, select="unfiltered")
    assert metrics["round1/excluded"] == 4 and metrics["round1/accuracy"] == metrics["round1/coverage"] == 1
    assert metrics["round1/never_solved"] == 1
    assert "failed on 4 of 72 rows" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize(
    "setting,words",
    [({"select": "best"}, "choose one of shortest"), ({"train_from": "x"}, "base, latest"), ({"rounds": 0}, "1 or more")],
)
def test_bad_settings(base, problems, tmp_path, setting, words):
    with pytest.raises(UserError, match=words):
        start(base, problems, tmp_path / "run", "exact", **setting)
