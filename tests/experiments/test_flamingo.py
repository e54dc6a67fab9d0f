"""experiments.flamingo on a simulated mesh: three steps of the bridge over a frozen decoder and a frozen vision encoder."""

import json
import math

import jax
import numpy as np
import pytest

from experiments import flamingo
from jaxllm import launch
from jaxllm.core.types import UserError
from jaxllm.data import images as data
from jaxllm.train import loop
from jaxllm.train.checkpoint import restore_params
from jaxllm.train.guard import NonFinite
from jaxllm.worlds import images as world
from tests.experiments.conftest import MESH

SMALL = {
    "steps": 3, "batch_size": 8, "log_every": 1, "data.images": 80, "data.test": 20, "vision.steps": 3, "vision.batch_size": 8,
    "model.d_vision": 16, "model.n_latents": 2, "model.n_heads": 2, "model.vision.n_layers": 1, "model.vision.n_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small_language():
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"steps": 3, "batch_size": 8, "model.d_model": 16, "model.n_heads": 2, "model.d_ff": 32, "model.n_layers": 2}
        patch.setattr(flamingo, "LANGUAGE", {**flamingo.LANGUAGE, **sizes})
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on a 2 x 2 x 2 mesh."""
    workdir = tmp_path_factory.mktemp("flamingo") / "run"
    return workdir, launch.start(flamingo.main, "flamingo", {**SMALL, **MESH}, workdir)


def test_three_steps_and_what_is_measured(run):
    workdir, result = run
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [m["train/loss"] for m in logged if "train/loss" in m]
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    metrics = result["metrics"]
    assert all(0 <= metrics[f"exact/{n}"] <= 1 for n in ("image", "other", "none", "majority")) and metrics["exact/majority"] > 0
    assert len(result["claims"]) == 3 and (workdir / "figures" / "pictures.png").stat().st_size > 200
    samples = [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 10 and all(s["answer"] for s in samples)


def test_the_decoder_is_the_one_that_was_trained_before_bit_for_bit(run):
    workdir, _ = run
    decoder = restore_params(workdir / "pretrain")[0]["policy"]
    whole = restore_params(workdir)[0]["policy"]
    jax.tree.map(np.testing.assert_array_equal, decoder, {name: whole[name] for name in decoder})
    gates = [np.asarray(whole["cross_layers"][name]) for name in ("attention_gate", "ffn_gate")]
    assert all((g != 0).all() for g in gates), "the gates start at 0"


def test_the_first_loss_is_that_of_the_decoder_alone(run, tmp_path):
    """The gates are shut at the start: with or without images, the same text has the same loss."""
    workdir, _ = run
    first = []
    for name, trainable in (("bridge", "^policy/(resampler|cross_layers)/"), ("gates", "gate$")):
        overrides = {**SMALL, "steps": 1, "init": str(workdir / "pretrain"), "trainable": trainable}
        launch.start(flamingo.main, "flamingo", overrides, tmp_path / name)
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        first.append(rows[0]["train/loss"])
    base = launch.load(workdir / "pretrain")
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert first[0] == first[1] == pytest.approx(logged[0]["train/loss"], abs=1e-5)
    assert base.model.config.vocab_size < 60


def test_a_stopped_run_continues_to_the_same_bits(run, tmp_path, monkeypatch):
    """The vision encoder is trained again, and the checkpoint's frozen leaves and the new ones are the same."""
    workdir, _ = run
    overrides = {**SMALL, "steps": 4, "save_every": 2, "init": str(workdir / "pretrain")}
    launch.start(flamingo.main, "flamingo", overrides, tmp_path / "whole")
    real, calls = loop.fetch, []

    def stop_at_the_third_step(pending):
        calls.append(1)
        if len(calls) == SMALL["vision.steps"] + 3:
            raise InterruptedError
        return real(pending)

    monkeypatch.setattr(loop, "fetch", stop_at_the_third_step)
    with pytest.raises(InterruptedError):
        launch.start(flamingo.main, "flamingo", overrides, tmp_path / "stopped")
    monkeypatch.setattr(loop, "fetch", real)
    launch.start(flamingo.main, "flamingo", overrides, tmp_path / "stopped")
    assert "resumed at step 2 of 4" in (tmp_path / "stopped" / "log.txt").read_text()
    whole, stopped = (restore_params(tmp_path / name)[0] for name in ("whole", "stopped"))
    jax.tree.map(np.testing.assert_array_equal, whole, stopped)


def test_a_vision_encoder_whose_loss_is_not_finite_ends_the_run(run, tmp_path, monkeypatch):
    """The guard stands there too: the bridge is not trained on features that are nan."""
    real = flamingo.see_loss

    def bad(*given):
        loss, metrics = real(*given)
        return loss.replace(total=loss.total * jax.numpy.nan), metrics

    monkeypatch.setattr(flamingo, "see_loss", bad)
    overrides = {**SMALL, "vision.steps": 8, "init": str(run[0] / "pretrain")}
    with pytest.raises(NonFinite, match="from step 1 on"):
        launch.start(flamingo.main, "flamingo", overrides, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_every_kind_of_question_is_asked_and_answered_by_the_picture():
    pictures = world.draw(50, seed=0)
    questions = flamingo.asked(pictures, seed=1)
    assert len(questions) == 50 and {kind for kind, _, _ in questions} == {"colour", "ground", "shape", "place", "caption"}
    for i, (kind, question, answer) in enumerate(questions):
        assert world.questions(pictures, i)[kind] == (question, answer)


def test_only_the_answer_is_trained():
    pictures = world.draw(20, seed=0)
    questions = flamingo.asked(pictures, seed=1)
    words = sorted({w for _, q, a in questions for w in f"{q} {a}".split()})
    tokenizer = data.word_tokenizer(words)
    config = type("Config", (), {"data": type("Data", (), {"length": 16})})
    rows = flamingo.rows_of(config, tokenizer, pictures, questions)
    for i, (_, _, answer) in enumerate(questions):
        targets = rows["targets"][i][rows["mask"][i]]
        assert tokenizer.decode(targets[:-1]) == answer and targets[-1] == tokenizer.specials["eos"]
    assert rows["inputs"]["pixels"].shape == (20, 1, 12, 12)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"data.length": 4}, "questions are longer than config.data.length=4"),
        ({"model.vision.patch": 5}, "patches of 5 x 5"),
        ({"model.n_heads": 3}, "n_heads=3 does not divide"),
        ({"init": "nowhere"}, "nowhere: no such run directory"),
        ({"batch_size": 100}, "more than the 80 rows"),
    ],
)
def test_settings_that_cannot_work(run, tmp_path, changes, match):
    workdir, _ = run
    with pytest.raises(UserError, match=match):
        launch.start(flamingo.main, "flamingo", {**SMALL, "init": str(workdir / "pretrain"), **changes}, tmp_path / "run")
