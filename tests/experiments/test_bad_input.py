"""Bad input gives one clear line before the first step, exit code 2, and overwrites nothing."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments import dpo, ppo, pretrain, reward, sft
from jaxllm import launch
from jaxllm.core.types import UserError
from jaxllm.train import checkpoint
from tests.experiments.conftest import TINY, write_rows


def check_refused(main, experiment, overrides, workdir, match):
    with pytest.raises(UserError, match=match) as error:
        launch.start(main, experiment, overrides, workdir)
    assert not (workdir / "checkpoints").exists() and not (workdir / "metrics.jsonl").exists()
    return str(error.value)


def pretrain_with(files, **changes):
    return {**TINY, "steps": 3, "data.path": files["text"], **changes}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"data.path": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"model.n_heads": 5}, "n_heads=5 does not divide model.d_model=32"),
        ({"model.n_heads": 4, "model.n_kv_heads": 3}, "n_kv_heads=3 does not divide"),
        ({"batch_size": 6, "mesh.data": 4}, "batch_size=6 does not divide"),
        ({"batch_size": 8, "accumulate": 3}, "batch_size=8 does not divide"),
        ({"batch_size": 2_000}, "more than the"),
        ({"log_every": 0}, "config.log_every=0: give 1 or more"),
        ({"accumulate": 0}, "config.accumulate=0: give 1 or more"),
        ({"steps": -1}, "config.steps=-1: give 0 or more"),
        ({"data.length": 1000}, "longer than the model's context of 96"),
        ({"mesh.data": 64}, "needs 64 devices"),
        ({"model.n_heads": 1, "mesh.tensor": 2}, "heads' of size 1 does not divide"),
        ({"tokenizer": "nowhere.model"}, "nowhere.model"),
        ({"steps_": 3}, "steps"),
    ],
)
def test_settings_that_cannot_work(files, tmp_path, changes, match):
    check_refused(pretrain.main, "pretrain", pretrain_with(files, **changes), tmp_path / "run", match)


def test_a_refused_run_can_be_repeated_with_the_fix(files, tmp_path):
    check_refused(
        pretrain.main, "pretrain", pretrain_with(files, batch_size=6, **{"mesh.data": 4}), tmp_path / "run", "does not divide"
    )
    result = launch.start(pretrain.main, "pretrain", pretrain_with(files, batch_size=8, **{"mesh.data": 4}), tmp_path / "run")
    assert result["experiment"] == "pretrain"


def test_empty_file(files, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    check_refused(
        pretrain.main,
        "pretrain",
        pretrain_with(files, **{"data.path": str(tmp_path / "empty.jsonl")}),
        tmp_path / "run",
        "empty.jsonl",
    )


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"messages": [', r"bad\.jsonl:3"),
        ('{"text": "only text"}', r"bad\.jsonl:3.*text"),
        ('{"messages": [{"role": "asistant", "content": "x"}]}', r"bad\.jsonl:3.*asistant.*assistant"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}', r"bad\.jsonl:3.*preference"),
    ],
)
def test_malformed_conversations_are_named_by_file_and_line(tmp_path, base, line, match):
    good = json.dumps({"prompt": "say cat", "completion": "cat"})
    (tmp_path / "bad.jsonl").write_text("\n".join([good] * 2 + [line] + [good] * 20))
    overrides = {"steps": 3, "batch_size": 4, "init": str(base), "data.path": str(tmp_path / "bad.jsonl"), "data.length": 32}
    check_refused(sft.main, "sft", overrides, tmp_path / "run", match)


def test_conversations_without_a_trained_token(tmp_path, base):
    rows = [{"messages": [{"role": "user", "content": "hello there"}]}] * 4 + [{"prompt": "say cat", "completion": "cat"}] * 20
    path = write_rows(tmp_path / "untrained.jsonl", rows)
    overrides = {"steps": 3, "batch_size": 4, "init": str(base), "data.path": path, "data.length": 32}
    check_refused(sft.main, "sft", overrides, tmp_path / "run", "no trained token")


def test_long_conversations_are_counted(tmp_path, base):
    rows = [{"prompt": "say cat", "completion": "cat " * (20 if i in (3, 8, 9) else 1)} for i in range(24)]
    path = write_rows(tmp_path / "long.jsonl", rows)
    overrides = {"steps": 1, "batch_size": 4, "init": str(base), "data.path": path, "data.length": 32, "data.held_out": 0.0}
    launch.start(sft.main, "sft", overrides, tmp_path / "run")
    log = (tmp_path / "run" / "log.txt").read_text()
    cut = re.search(r"train: 23 examples .* truncated (\d)", log)[1]
    assert cut in "23" and f"WARNING train: {cut} of 23 examples are longer than config.data.length and were cut: raise it" in log
    assert json.loads((tmp_path / "run" / "data_report.json").read_text())["train"]["truncated"] == int(cut)


@pytest.mark.parametrize("module", [reward, dpo])
def test_fine_tuning_data_given_to_a_preference_stage(files, tmp_path, base, module):
    name = module.__name__.rpartition(".")[2]
    overrides = {"steps": 3, "batch_size": 8, "init": str(base), "data.path": files["chat"]}
    check_refused(module.main, name, overrides, tmp_path / "run", "chat.jsonl:1 looks like SFT data")


def test_an_unknown_preference_loss(files, tmp_path, base):
    overrides = {"steps": 3, "batch_size": 8, "init": str(base), "data.path": files["pairs"], "loss": "nope"}
    check_refused(dpo.main, "dpo", overrides, tmp_path / "run", "choose one of dpo, ")


def test_ppo_without_prompts(files, tmp_path, base):
    overrides = {"steps": 3, "batch_size": 8, "init": str(base), "reward_model": str(base), "data.path": files["text"]}
    check_refused(ppo.main, "ppo", overrides, tmp_path / "run", "text.jsonl:1: PPO needs a `prompt`")


def test_ppo_prompt_longer_than_its_limit(files, tmp_path, base):
    from experiments import reward as reward_experiment

    pairs = {"steps": 1, "batch_size": 8, "init": str(base), "data.path": files["pairs"], "data.length": 32}
    launch.start(reward_experiment.main, "reward", pairs, tmp_path / "reward")
    path = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "x" * (60 if i == 5 else 4)} for i in range(16)])
    overrides = {
        "steps": 1, "batch_size": 8, "init": str(base), "reward_model": str(tmp_path / "reward"), "data.path": path,
        "max_prompt": 20, "max_new_tokens": 8,
    }  # fmt: skip
    check_refused(ppo.main, "ppo", overrides, tmp_path / "run", r"prompts\.jsonl row 6 has .* more than max_prompt=20")


def test_ids_outside_the_vocabulary_are_refused():
    import numpy as np

    from experiments.common import check_columns

    columns = {"chosen": {"tokens": np.zeros((2, 3), np.int32), "targets": np.array([[0, 1, 2], [3, 99, 1]], np.int32)}}
    check_columns(columns, 100)
    with pytest.raises(UserError, match="99"):
        check_columns(columns, 99)


def test_a_directory_that_cannot_be_written_is_said_before_anything_else(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(launch, "prepare_jax", lambda: pytest.fail("jax was started first"))
    for where in (tmp_path / "file" / "run", Path("/proc/jaxllm/run")):
        with pytest.raises(UserError, match=r"run directory .*run cannot be written: .*Give another --workdir"):
            launch.start(pretrain.main, "pretrain", {}, where)


def test_data_that_changed_since_the_checkpoint(files, tmp_path):
    data = shutil.copy(files["text"], tmp_path / "text.jsonl")
    given = pretrain_with(files, **{"data.path": str(data), "steps": 1})
    launch.start(pretrain.main, "pretrain", given, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()  # as if it had been stopped behind its last checkpoint
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with data.open("a") as file:
        file.write(json.dumps({"text": "a line more, of many words " * 9}) + "\n")
    with pytest.raises(UserError, match=r"data changed since the checkpoint: its fingerprint was \w{16}, now it is \w{16}"):
        launch.start(pretrain.main, "pretrain", given, tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    shutil.copy(files["text"], data)  # "Restore the old data"
    assert launch.start(pretrain.main, "pretrain", given, tmp_path / "run")["experiment"] == "pretrain"


def test_a_checkpoint_of_another_architecture_or_type(base, tmp_path):
    run = shutil.copytree(base / "sft", tmp_path / "run")
    (step,) = (p for p in (run / "checkpoints").iterdir() if p.name.isdigit())
    meta = json.loads((step / "meta" / "metadata").read_text())
    meta["model"]["d_model"] = 64
    (step / "meta" / "metadata").write_text(json.dumps(meta))
    (step / "MANIFEST.json").unlink()
    differ = r"of another architecture \(\d+ differ\): .*here \(\d+, 64\), there \(\d+, 32\)"
    with pytest.raises(UserError, match=differ) as error:
        launch.load(run)
    assert str(error.value).count(": here (") == 5
    params = launch.load(base / "sft").params
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    with pytest.raises(UserError, match="here bfloat16, there float32"):
        checkpoint.restore_params(base / "sft", like=half)
