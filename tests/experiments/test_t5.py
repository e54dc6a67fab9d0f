"""experiments.t5 on a simulated mesh: span corruption, then tasks from it, what they report, and what they refuse."""

import json
import math
import shutil
import signal
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments import t5, text2text
from jaxllm import launch
from jaxllm.core.types import UserError
from jaxllm.data import denoise
from jaxllm.data import tokenizer as tokenizers
from jaxllm.train import loop
from jaxllm.train.checkpoint import newest_meta, restore_params
from tests.experiments.conftest import MESH, write_rows

MODEL = {
    "model.d_model": 16, "model.n_heads": 2, "model.head_dim": 4, "model.d_ff": 24, "model.n_layers": 1, "model.max_length": 96,
}  # fmt: skip
SMALL = {
    "steps": 3, "batch_size": 8, "log_every": 1, "tokenizer": "byte", "data.length": 32, "optim.warmup": 0,
    "optim.lr": 1e-2, **MODEL,
}  # fmt: skip


def losses_of(workdir):
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [m["train/loss"] for m in logged if "train/loss" in m]


@pytest.fixture(scope="module")
def spans(files, tmp_path_factory):
    path = tmp_path_factory.mktemp("t5") / "spans"
    launch.start(t5.main, "t5", {**SMALL, **MESH, "data.path": files["text"]}, path)
    return path


@pytest.fixture(scope="module")
def one(files, tmp_path_factory):
    """The same on one device."""
    path = tmp_path_factory.mktemp("t5") / "one"
    launch.start(t5.main, "t5", {**SMALL, "save_every": 2, "data.path": files["text"]}, path)
    return path


@pytest.fixture(scope="module")
def tasks_file(tmp_path_factory):
    words = ["cat", "dog", "sea", "hill", "rain", "moon", "old", "green"]
    rows = [{"task": "copy", "input": f"{a} {b}", "target": f"{a} {b}"} for a in words for b in words]
    rows += [{"task": "first", "prompt": f"{a} {b}", "completion": a} for a in words for b in words]
    rows += [{"task": "sign", "input": a * 2, "target": "plus" if i else "minus"} for i, a in enumerate(words)]
    return write_rows(tmp_path_factory.mktemp("tasks") / "tasks.jsonl", rows)


def test_span_corruption_in_three_steps_on_a_mesh(spans):
    losses = losses_of(spans)
    assert len(losses) == 3 and all(map(math.isfinite, losses)) and losses[2] < losses[0]
    assert losses[0] == pytest.approx(math.log(362) + 0.5, abs=0.5)  # logits begin with variance 1
    meta = newest_meta(spans)
    assert meta["model"]["family"] == "encdec" and meta["model"]["vocab_size"] == 362 and meta["model"]["start_id"] == 256
    assert json.loads((spans / "result.json").read_text())["metrics"].keys() >= {"eval/loss", "eval/mean_token_accuracy"}


def test_one_device_and_a_mesh_train_alike(spans, one):
    assert losses_of(one) == pytest.approx(losses_of(spans), abs=1e-4)


def test_tasks_begin_from_the_corrupted_spans_and_are_judged(spans, tasks_file, tmp_path):
    overrides = {
        **{k: v for k, v in SMALL.items() if k not in MODEL}, **MESH, "init": str(spans), "data.path": tasks_file,
        "data.held_out": 0.2, "data.target_length": 16,
    }  # fmt: skip
    result = launch.start(t5.main, "t5", overrides, tmp_path / "tasks", variant="multitask")
    metrics, report = result["metrics"], [k.split("/")[1] for k in result["metrics"] if k.startswith("exact_match/")]
    assert report == ["copy", "first", "sign"]
    assert metrics["copied_input/copy"] == 1 and metrics["copied_input/first"] == 0
    assert metrics["usual_target/copy"] == 0 and metrics["usual_target/sign"] >= 0
    assert metrics["eval/exact_match"] == np.mean([metrics[f"exact_match/{t}"] for t in report])
    a, b = (restore_params(path)[0]["policy"] for path in (spans, tmp_path / "tasks"))
    steps = [np.abs(x - y).max() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]
    assert 0 < max(steps) < 0.1, "three small steps away from where it began"


def test_a_model_that_has_learnt_its_task_is_found_out(tasks_file, tmp_path):
    """Exact match rises from nothing: one target for all is learnt in a minute's fraction."""
    rows = [{"task": "sign", "input": f"{i}", "target": "plus"} for i in range(40)]
    overrides = {
        **SMALL, "steps": 40, "log_every": 20, "data.length": 16, "data.target_length": 8,
        "data.path": write_rows(tmp_path / "one.jsonl", rows), "data.held_out": 0.2,
    }  # fmt: skip
    metrics = launch.start(t5.main, "t5", overrides, tmp_path / "run", variant="multitask")["metrics"]
    assert metrics["exact_match/sign"] == metrics["usual_target/sign"] == 1 and metrics["copied_input/sign"] == 0


def test_stopped_and_started_again_it_ends_with_the_same_bits(one, files, tmp_path, monkeypatch, capsys):
    overrides = {**SMALL, "save_every": 2, "data.path": files["text"]}
    real, calls = loop.fetch, []

    def stop_in_step_two(pending):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(pending)

    monkeypatch.setattr(loop, "fetch", stop_in_step_two)
    with pytest.raises(SystemExit):
        launch.start(t5.main, "t5", overrides, tmp_path / "run")
    deadline = time.time() + 30
    while not (tmp_path / "run" / "checkpoints" / "2").is_dir() and time.time() < deadline:
        time.sleep(0.05)  # written in the background
    monkeypatch.setattr(loop, "fetch", real)
    launch.start(t5.main, "t5", overrides, tmp_path / "run")
    assert "resumed at step 2 of 3" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, restore_params(one)[0], restore_params(tmp_path / "run")[0])
    assert losses_of(one) == losses_of(tmp_path / "run")


def test_prefixes_and_the_rest_are_rows_too():
    config = launch.settings.load_config(launch.settings.CONFIGS / "t5.py", None)
    with config.unlocked():
        config.objective, config.data.length = "prefix", 16
    tokenizer = denoise.with_sentinels(tokenizers.byte_tokenizer())
    run = SimpleNamespace(note=print, writes=False)
    record = t5.corrupted(config, run, tokenizer, ["the moon is far and the sea is deep"] * 9, "train")
    rows, sides = len(record["tokens"]), (record["inputs"]["tokens"].shape[1], record["tokens"].shape[1])
    assert sides == (16, 17) and (record["tokens"][:, 0] == 256).all()
    read = sum(len(np.unique(record["inputs"]["segments"][r])) for r in range(rows))
    assert read > rows, "short prefixes and their continuations share rows"


def test_the_built_in_tasks_are_read():
    config = launch.settings.load_config(launch.settings.CONFIGS / "t5.py", "multitask")
    with config.unlocked():
        config.data.tasks, config.data.test = "add, sentiment", 7
    tasks = text2text.tasks_of(config, None)
    assert {name: (len(train), len(test)) for name, (train, test) in tasks.items()} == {"add": (400, 7), "sentiment": (600, 7)}
    assert all(source.startswith("add: ") for source, _ in tasks["add"][0])


@pytest.mark.parametrize(
    ("variant", "changes", "match"),
    [
        (None, {"objective": "mlm"}, "choose spans, prefix or text2text"),
        (None, {"model.activation": "tanh"}, "model.activation='tanh'"),
        (None, {"data.length": 200}, "longer than the model's context of 96"),
        ("multitask", {"data.tasks": "copy,sum"}, "no task 'sum'; there are copy, first, sign"),
    ],
)
def test_settings_that_cannot_work(files, tasks_file, tmp_path, variant, changes, match):
    path = tasks_file if variant else files["text"]
    with pytest.raises(UserError, match=match):
        launch.start(t5.main, "t5", {**SMALL, "data.path": path, **changes}, tmp_path / "run", variant=variant)


def test_rows_and_runs_of_another_kind_are_refused(base, files, tasks_file, tmp_path):
    with pytest.raises(UserError, match="text.jsonl:1 needs input and target"):
        launch.start(t5.main, "t5", {**SMALL, "data.path": files["text"]}, tmp_path / "a", variant="multitask")
    overrides = {**SMALL, "data.path": tasks_file, "init": str(base / "pretrain")}
    with pytest.raises(UserError, match="not an encoder-decoder"):
        launch.start(t5.main, "t5", overrides, tmp_path / "b", variant="multitask")
    with pytest.raises(UserError, match="t5-base"):
        launch.start(t5.main, "t5", {}, tmp_path / "c", variant="t5-huge")
    shutil.rmtree(tmp_path)
