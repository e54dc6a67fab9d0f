"""Best of n by a verifier and by a reward model, on a tiny model."""

import json

import numpy as np
import pytest

from experiments import best_of_n
from jaxllm import launch
from jaxllm.core.types import UserError
from tests.experiments.conftest import write_rows
from tests.experiments.test_stages import metrics_of, reward_run  # noqa: F401

SMALL = {"samples": 6, "prompts": 5, "sample_batch": 30, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    root = tmp_path_factory.mktemp("problems")
    (root / "mine.py").write_text(
        "def length(row):\n    return len(row['completion'])\n"
        "def one_bad(row):\n    return float('nan') if row['prompt'] == 'say 3' else len(row['completion'])\n"
        "def none(row):\n    return None\n"
    )
    return write_rows(root / "rows.jsonl", [{"prompt": f"say {i}", "answer": str(i)} for i in range(5)]), str(root / "mine.py")


def start(base, problems, workdir, reward, **overrides):
    given = {**SMALL, "init": str(base), "data.path": problems[0], "rewards": f"{problems[1]}:{reward}", **overrides}
    return launch.start(best_of_n.main, "best_of_n", given, workdir)


def test_the_best_by_the_verifier(base, problems, tmp_path):
    result = start(base, problems, tmp_path / "run", "length")
    metrics, logged = result["metrics"], metrics_of(tmp_path / "run")
    assert [m["step"] for m in logged] == [1, 2, 4, 6]
    assert metrics["kl_bound/1"] == 0 and metrics["kl_bound/4"] == pytest.approx(np.log(4) - 0.75)
    assert metrics["gold/1"] <= metrics["gold/2"] <= metrics["gold/4"] <= metrics["gold/6"]
    assert all(metrics[f"gold/{n}"] == metrics[f"proxy/{n}"] for n in (1, 2, 4, 6))
    best = [json.loads(line) for line in (tmp_path / "run" / "best.jsonl").read_text().splitlines()]
    assert len(best) == 5 and metrics["gold/6"] == pytest.approx(np.mean([r["score"] for r in best]))
    assert all(r["score"] == len(r["messages"][-1]["content"]) for r in best)
    assert (tmp_path / "run" / "figures" / "best_of_n.svg").is_file() and result["claims"][0]["holds"]


def test_weights_in_int8_draw_almost_the_same(base, problems, tmp_path):
    exact, rounded = (
        start(base, problems, tmp_path / str(int8), "length", int8=int8, samples=2)["metrics"] for int8 in (False, True)
    )
    assert rounded["gold/1"] == pytest.approx(exact["gold/1"], abs=2) and rounded["prompts"] == 5


def test_the_best_by_a_reward_model(reward_run, base, problems, tmp_path):  # noqa: F811
    metrics = start(base, problems, tmp_path / "run", "length", reward_model=str(base))["metrics"]
    assert metrics["proxy/1"] <= metrics["proxy/6"] and metrics["gold/6"] != metrics["proxy/6"]


def test_prompts_with_a_failure_are_left_out(base, problems, tmp_path):
    metrics = start(base, problems, tmp_path / "run", "one_bad")["metrics"]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert metrics["prompts"] == 4 and "failed on 6 of 30 rows" in log and "1 of 5 prompts" in log
    with pytest.raises(UserError, match="every prompt has a completion without a reward: .*no finite number"):
        start(base, problems, tmp_path / "none", "none")
