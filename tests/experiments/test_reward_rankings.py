"""The reward experiment on margins and rankings, and what it says of its scores."""

import pytest

from experiments import reward
from jaxllm import launch
from jaxllm.core.types import UserError
from tests.experiments.conftest import SENTENCES, write_rows

SMALL = {"steps": 2, "batch_size": 8, "log_every": 1, "data.length": 32}
WORDS = [f"{s} {i}".split() for i, s in enumerate(SENTENCES * 10)]


def margins(path):
    return write_rows(
        path, [{"prompt": f"say {w[1]}", "chosen": w[1], "rejected": w[2] + " no", "margin": i % 3} for i, w in enumerate(WORDS)]
    )


def rankings(path):
    return write_rows(
        path, [{"prompt": f"say {w[1]}", "ranked": [w[1], w[2], "no no"][: 2 + i % 2]} for i, w in enumerate(WORDS)]
    )


@pytest.mark.parametrize("rows", [margins, rankings])
def test_margins_and_rankings_train_and_are_checked(rows, base, tmp_path):
    overrides = {**SMALL, "init": str(base), "data.path": rows(tmp_path / "rows.jsonl")}
    got = launch.start(reward.main, "reward", overrides, tmp_path / "run")["metrics"]
    assert {"eval/accuracy", "eval/margin", "eval/calibration_error", "eval/length_only_accuracy"} <= got.keys()
    assert got["eval/accuracy_low"] <= got["eval/accuracy"] <= got["eval/accuracy_high"]
    assert got["eval/length_only_accuracy"] >= 0.5
    assert (tmp_path / "run" / "figures" / "calibration.svg").exists()


def test_an_unknown_way_to_read_rankings_is_named(base, tmp_path):
    overrides = {**SMALL, "init": str(base), "data.path": rankings(tmp_path / "rows.jsonl"), "ranking": "borda"}
    with pytest.raises(UserError, match="config.ranking=borda is none of kwise, plackett_luce"):
        launch.start(reward.main, "reward", overrides, tmp_path / "run")
