"""Every experiment takes its steps on a mesh with all kinds of parallelism, and trains as on one device."""

import json
from pathlib import Path

import pytest

from experiments import dpo, grpo, kto, mlm, moe, ppo, pretrain, reward, sft, t5
from jaxllm import launch
from tests.experiments.conftest import TINY, write_rows

pytestmark = pytest.mark.slow

MESH = {"mesh.fsdp": 2, "mesh.tensor": 2, "mesh.context": 2, "rules": "residual=context+tensor"}
SMALL = {"steps": 2, "batch_size": 8, "log_every": 1}


@pytest.fixture(scope="module")
def runs(files, tmp_path_factory):
    """One life cycle to SFT and a reward model, on the mesh."""
    root = tmp_path_factory.mktemp("mesh")
    launch.start(pretrain.main, "pretrain", {**TINY, **MESH, "steps": 2, "data.path": files["text"]}, root / "pretrain")
    chat = {**SMALL, "data.path": files["chat"], "data.length": 32, "init": str(root)}
    launch.start(sft.main, "sft", {**chat, **MESH}, root / "sft")
    launch.start(reward.main, "reward", {**pairs(files), **MESH, "init": str(root)}, root / "reward")
    return root


def pairs(files):
    return {**SMALL, "data.path": files["pairs"], "data.length": 32}


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def same(main, name, overrides, tmp_path, variant=None):
    """The losses of a run on the mesh are those of a run on one device."""
    for label, mesh in (("one", {}), ("many", MESH)):
        launch.start(main, name, {**overrides, **mesh}, tmp_path / label, variant=variant)
    one, many = losses(tmp_path / "one"), losses(tmp_path / "many")
    assert len(one) == 2 and many == pytest.approx(one, rel=2e-4, abs=1e-5)


def test_pretraining(files, tmp_path):
    same(pretrain.main, "pretrain", {**TINY, **SMALL, "data.path": files["text"]}, tmp_path)


def test_dpo(files, runs, tmp_path):
    same(dpo.main, "dpo", {**pairs(files), "init": str(runs)}, tmp_path)


def test_kto_with_adapters(files, runs, tmp_path):
    rows = [json.loads(line) for line in Path(files["pairs"]).read_text().splitlines()]
    rows = [{"prompt": r["prompt"], "completion": r[k], "label": k == "chosen"} for r in rows for k in ("chosen", "rejected")]
    path = write_rows(tmp_path / "labels.jsonl", rows)
    settings = {**SMALL, "data.path": path, "data.length": 32, "init": str(runs), "lora.rank": 2}
    same(kto.main, "kto", settings, tmp_path)


@pytest.mark.parametrize("variant", [None, "loss-free"])
def test_experts(files, tmp_path, variant):
    settings = {**TINY, **SMALL, "data.path": files["text"], "model.moe.n_experts": 4}
    mesh = {"mesh.data": 2, "mesh.expert": 2, "mesh.context": 2}
    launch.start(moe.main, "moe", {**settings, **mesh}, tmp_path / "many", variant=variant)
    assert len(losses(tmp_path / "many")) == 2


def test_masked_tokens_and_text_to_text(files, tmp_path):
    launch.start(mlm.main, "mlm", {**TINY, **SMALL, **MESH, "data.path": files["text"]}, tmp_path / "mlm")
    small = {k: v for k, v in TINY.items() if k not in ("model.max_length", "data.length")}
    launch.start(t5.main, "t5", {**small, **SMALL, **MESH, "data.path": files["text"], "data.length": 32}, tmp_path / "t5")
    assert len(losses(tmp_path / "mlm")) == len(losses(tmp_path / "t5")) == 2


def test_policies(files, runs, tmp_path):
    settings = {**SMALL, **MESH, "data.path": files["prompts"], "max_new_tokens": 8, "init": str(runs)}
    launch.start(ppo.main, "ppo", {**settings, "reward_model": str(runs)}, tmp_path / "ppo")
    rows = [{"prompt": f"say {i}", "answer": str(i)} for i in range(32)]
    path = write_rows(tmp_path / "problems.jsonl", rows)
    settings |= {"data.path": path, "group": 4, "minibatches": 1}
    launch.start(grpo.main, "grpo", settings, tmp_path / "grpo")
    assert len(losses(tmp_path / "ppo")) == len(losses(tmp_path / "grpo")) == 2
