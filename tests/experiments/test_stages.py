"""Every experiment runs on a simulated 2 x 2 x 2 mesh, from the stage before it, and leaves what the next one needs."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import dpo, ppo, reward
from jaxllm import launch
from jaxllm.core.types import UserError
from jaxllm.train.checkpoint import restore_params
from tests.experiments.conftest import MESH

SMALL = {"steps": 3, "batch_size": 8, "log_every": 1, **MESH}


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def params_of(workdir, root):
    return restore_params(workdir)[0][root]


def moved(a, b):
    return max(
        float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.fixture(scope="session")
def reward_run(base, files):
    return launch.start(
        reward.main, "reward", {**SMALL, "init": str(base), "data.path": files["pairs"], "data.length": 32}, base / "reward"
    )


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_language_model_stages_log_three_finite_steps(base, stage):
    steps = [m for m in metrics_of(base / stage) if "train/loss" in m]
    assert [m["step"] for m in steps] == [1, 2, 3]
    assert all(math.isfinite(m["train/loss"]) for m in steps)
    assert {"train/mean_token_accuracy", "train/grad_norm", "train/lr"} <= steps[0].keys()


def test_sft_starts_from_the_pretrained_weights(base):
    before, after = params_of(base / "pretrain", "policy"), params_of(base / "sft", "policy")
    assert 0 < moved(before, after) < 0.1


def test_reward_begins_at_log_two(reward_run, base):
    first = metrics_of(base / "reward")[0]
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["train/accuracy"] == 0.5
    assert reward_run["metrics"].keys() >= {"eval/accuracy"}


def test_dpo_begins_at_the_reference(base, files):
    launch.start(
        dpo.main,
        "dpo",
        {**SMALL, "init": str(base), "data.path": files["pairs"], "data.length": 32, "nll_weight": 0.0},
        base / "dpo",
    )
    first, *_, last = metrics_of(base / "dpo")
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert moved(params_of(base / "sft", "policy"), params_of(base / "dpo", "policy")) > 0
    assert last["step"] == 3


@pytest.mark.parametrize("loss", ["cdpo", "reference_free"])
def test_the_siblings_of_dpo_train_too(base, files, tmp_path, loss):
    overrides = {**SMALL, "steps": 1, "init": str(base), "data.path": files["pairs"], "data.length": 32, "loss": loss}
    launch.start(dpo.main, "dpo", overrides, tmp_path / loss)
    (step,) = [m for m in metrics_of(tmp_path / loss) if "train/loss" in m]
    dpo_at_the_start = math.log(2)
    nll = 0.2 * step["train/nll_loss"]
    if loss == "cdpo":
        assert step["train/loss"] - nll == pytest.approx(dpo_at_the_start, abs=1e-4)
    else:
        assert step["train/loss"] - nll != pytest.approx(dpo_at_the_start, abs=1e-3)


def test_ppo_begins_on_policy_and_trains_policy_and_value(reward_run, base, files):
    overrides = {
        **SMALL,
        "init": str(base),
        "reward_model": str(base),
        "data.path": files["prompts"],
        "max_prompt": 20,
        "max_new_tokens": 8,
    }
    launch.start(ppo.main, "ppo", overrides, base / "ppo")
    first = metrics_of(base / "ppo")[0]
    assert first["first/val/ratio"] == pytest.approx(1, abs=1e-4)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-4)
    params = restore_params(base / "ppo")[0]
    assert set(params) == {"policy", "value"}
    assert moved(params_of(base / "sft", "policy"), params["policy"]) > 0
    assert moved(params_of(base / "reward", "reward"), params["value"]) > 0


def test_ppo_on_a_data_mesh_samples_what_one_device_samples(reward_run, base, files, tmp_path):
    # 118 prompts: whole batches divide over the mesh, the prompts themselves do not
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(Path(files["prompts"]).read_text().splitlines(keepends=True)[:118]))
    overrides = {
        "steps": 1, "batch_size": 8, "init": str(base), "reward_model": str(base), "data.path": str(path),
        "max_prompt": 20, "max_new_tokens": 8,
    }  # fmt: skip
    firsts = []
    for data in (1, 4):
        workdir = tmp_path / str(data)
        launch.start(ppo.main, "ppo", {**overrides, "mesh.data": data}, workdir)
        firsts.append(metrics_of(workdir)[0])
    for name in ("completions/mean_length", "objective/scores", "objective/entropy", "train/loss"):
        assert firsts[0][name] == pytest.approx(firsts[1][name], rel=1e-3, abs=1e-4)


def test_load_finds_stages_and_says_what_is_there(base):
    assert launch.load(base, "sft").meta["experiment"] == "sft"
    assert launch.load(f"{base / 'sft'}@3").step == 3
    with pytest.raises(UserError, match="no checkpoint 7.*it has steps"):
        launch.load(f"{base / 'sft'}@7")
    with pytest.raises(UserError, match="no stage 'grpo'"):
        launch.load(base, "grpo")
    with pytest.raises(UserError, match="no such run directory"):
        launch.load(base / "nowhere")


def test_a_swapped_tokenizer_is_refused(base, tmp_path):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(base / "sft", copy)
    for file in (copy / "tokenizer").iterdir():
        file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(UserError):
        launch.load(copy)


def test_params_restore_with_plain_orbax(base):
    import orbax.checkpoint as ocp

    path = base / "sft" / "checkpoints" / "3" / "params"
    checkpointer = ocp.StandardCheckpointer()
    params = checkpointer.restore(path)
    assert moved(params["policy"], params_of(base / "sft", "policy")) == 0


def test_a_finished_stage_is_not_run_again(base, files):
    before = (base / "sft" / "metrics.jsonl").read_text()
    chat = {"steps": 3, "batch_size": 8, "data.path": files["chat"], "data.length": 32, "init": str(base), "log_every": 1}

    def main(config, run):
        raise AssertionError("a finished run was started again")

    result = launch.start(main, "sft", {**chat, **MESH}, base / "sft")
    assert result["experiment"] == "sft" and (base / "sft" / "metrics.jsonl").read_text() == before
