"""experiments.mlm and experiments.classify on a simulated mesh: what they train, report, resume and refuse."""

import json
import math

import jax
import numpy as np
import pytest

from experiments import classify, common, mlm
from jaxllm import launch
from jaxllm.convert import hf
from jaxllm.core.types import UserError
from jaxllm.data import masking
from jaxllm.data import tokenizer as tokenizers
from jaxllm.models import pooled
from jaxllm.train.checkpoint import newest_meta, restore_params
from tests.experiments.conftest import MESH, SENTENCES, write_rows

SMALL = {"steps": 3, "batch_size": 8, "log_every": 1, "data.length": 32}
TINY = {
    **SMALL, "tokenizer": "byte", "model.d_model": 32, "model.n_heads": 4, "model.d_ff": 64, "model.max_length": 64,
    "model.unroll": False,
}  # fmt: skip
VOCAB = 262 + 2  # cls and mask on top of the bytes
TRUNK = {"embed", "layers"}


def steps_of(workdir):
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [m for m in logged if "train/loss" in m]


def params_of(workdir, root):
    return restore_params(workdir)[0][root]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    """A run of mlm, three steps on a 2 x 2 x 2 mesh."""
    root = tmp_path_factory.mktemp("mlm")
    launch.start(mlm.main, "mlm", {**TINY, **MESH, "data.path": files["text"]}, root / "mlm")
    return root / "mlm"


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """{shape: path} of rows in every shape."""
    root = tmp_path_factory.mktemp("labelled")
    words = [SENTENCES[i % 6].split()[: 3 + i % 3] for i in range(40)]
    return {
        "sequence": write_rows(root / "s.jsonl", [{"text": " ".join(w), "label": w[0]} for w in words]),
        "token": write_rows(root / "t.jsonl", [{"words": w, "labels": [len(x) % 3 for x in w]} for w in words]),
        "span": write_rows(root / "q.jsonl", [{"question": "what?", "context": " ".join(w), "answer": w[1]} for w in words]),
        "choice": write_rows(
            root / "c.jsonl",
            [{"text": w[0], "choices": [w[1], w[2], "x"][: 2 + i % 2], "label": i % 2} for i, w in enumerate(words)],
        ),
    }


@pytest.mark.parametrize("variant", ["tiny", "tiny-nsp"])
def test_three_steps_of_either_objective_on_a_mesh(files, tmp_path, variant):
    overrides = {**TINY, **MESH, "data.path": files["text"]}
    metrics = launch.start(mlm.main, "mlm", overrides, tmp_path / "run", variant=variant)["metrics"]
    steps = steps_of(tmp_path / "run")
    guess = math.log(VOCAB) + (0.69 if variant == "tiny-nsp" else 0)
    assert [m["step"] for m in steps] == [1, 2, 3] and steps[0]["train/loss"] == pytest.approx(guess, abs=0.5)
    assert 0.05 < np.mean([m["train/mask_rate"] for m in steps]) < 0.25
    assert metrics.keys() >= {"eval/loss", "eval/mean_token_accuracy", "eval/unigram_loss", "data/fill"}
    assert ("eval/nsp_accuracy" in metrics) == (variant == "tiny-nsp")
    family = newest_meta(tmp_path / "run")["model"]["family"]
    assert family == ("pooled" if variant == "tiny-nsp" else "encoder")
    loaded = launch.load(tmp_path / "run")
    assert loaded.model.config.vocab_size == VOCAB and set(loaded.params["policy"]) >= TRUNK


def test_one_device_and_a_mesh_train_alike(files, run, tmp_path):
    launch.start(mlm.main, "mlm", {**TINY, "data.path": files["text"]}, tmp_path / "one")
    one, many = ([m["train/loss"] for m in steps_of(w)] for w in (tmp_path / "one", run))
    assert one == pytest.approx(many, abs=1e-4)


def test_static_masks_are_those_of_the_seed(tmp_path):
    """Whole epochs: the number of masked tokens is that of every epoch, or of this one."""
    texts = [f"{sentence} {i}" for i, sentence in enumerate(SENTENCES)]
    path = write_rows(tmp_path / "text.jsonl", [{"text": t} for t in texts])
    rows = len(masking.documents(masking.extended(tokenizers.byte_tokenizer()), texts, 32)[0]["tokens"])
    overrides = {
        **TINY, "data.path": path, "data.held_out": 0.0, "steps": 2, "batch_size": rows,
    }  # fmt: skip
    for kind in ("static", "dynamic"):
        launch.start(mlm.main, "mlm", {**overrides, "masking": kind}, tmp_path / kind)
        first, second = (m["train/mask_rate"] for m in steps_of(tmp_path / kind))
        assert (first == second) == (kind == "static")


def test_masked_tokens_become_cheaper_than_their_frequency(files, tmp_path):
    overrides = {**TINY, "steps": 400, "batch_size": 32, "log_every": 100, "optim.lr": 5e-3, "data.held_out": 0.1}
    metrics = launch.start(mlm.main, "mlm", {**overrides, "data.path": files["text"]}, tmp_path / "run")["metrics"]
    assert metrics["eval/loss"] < metrics["eval/unigram_loss"] - 0.2


def interrupted(main, name, overrides, workdir, monkeypatch):
    """Runs until the batch of step 4 fails, then again with the same command."""
    make = common.make_loader

    def broken(*args, **more):
        loader = make(*args, **more)

        def batch(step):
            if step == 4:
                raise RuntimeError("the disk is gone")
            return loader.batch(step)

        return type(loader)(loader.size, batch, loader.state)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(common, "make_loader", broken)
        launch.start(main, name, overrides, workdir)
    return launch.start(main, name, overrides, workdir)


@pytest.mark.parametrize("mode", ["mlm", "probe"])
def test_a_resumed_run_is_the_uninterrupted_one(files, run, labelled, tmp_path, monkeypatch, mode):
    more = {"steps": 6, "save_every": 2}
    if mode == "mlm":
        main, name, overrides = mlm.main, "mlm", {**TINY, **more, "data.path": files["text"]}
    else:
        main, name = classify.main, "classify"
        overrides = {**SMALL, **more, "init": str(run), "data.path": labelled["sequence"], "mode": mode}
    whole = launch.start(main, name, overrides, tmp_path / "whole")
    resumed = interrupted(main, name, overrides, tmp_path / "resumed", monkeypatch)
    assert same(restore_params(tmp_path / "whole")[0], restore_params(tmp_path / "resumed")[0])
    assert resumed["metrics"] == whole["metrics"]
    assert "resumed at step 4" in (tmp_path / "resumed" / "log.txt").read_text()


@pytest.mark.parametrize("mode", ["finetune", "probe", "scratch"])
def test_modes_begin_and_train_what_they_say(run, labelled, tmp_path, mode):
    overrides = {**SMALL, **MESH, "init": str(run), "data.path": labelled["sequence"], "mode": mode, "seed": 1}
    metrics = launch.start(classify.main, "classify", overrides, tmp_path / "run")["metrics"]
    assert [m["step"] for m in steps_of(tmp_path / "run")] == [1, 2, 3]
    assert {"eval/accuracy", "eval/macro_f1", "baseline/majority", "baseline/bag_of_words"} <= metrics.keys()
    assert metrics["eval/accuracy_low"] <= metrics["eval/accuracy"] <= metrics["eval/accuracy_high"]
    before, after = params_of(run, "policy"), params_of(tmp_path / "run", "classifier")
    assert set(after) == TRUNK | {"classifier"}
    away = np.abs(np.asarray(after["embed"]["positions"]) - np.asarray(before["embed"]["positions"])).max()
    assert {"finetune": 0 < away < 0.01, "probe": away == 0, "scratch": away > 0.03}[mode]
    loaded = launch.load(tmp_path / "run")
    assert loaded.model.config.head == "sequence" and loaded.model.config.n_labels == 5
    record = {"tokens": np.full((2, 8), 97), "segments": np.ones((2, 8), int)}
    assert pooled.scores(loaded.model, loaded.params["classifier"], record).shape == (2, 5)


def test_a_probe_of_a_lower_layer(run, labelled, tmp_path):
    overrides = {**SMALL, "init": str(run), "data.path": labelled["sequence"], "mode": "probe", "layer": 0}
    launch.start(classify.main, "classify", overrides, tmp_path / "run")
    assert newest_meta(tmp_path / "run")["model"]["layer"] == 0


@pytest.mark.parametrize("shape", ["token", "span", "choice"])
def test_every_shape_of_rows(run, labelled, tmp_path, shape):
    overrides = {**SMALL, "init": str(run), "data.path": labelled[shape]}
    metrics = launch.start(classify.main, "classify", overrides, tmp_path / "run")["metrics"]
    assert 0 <= metrics["eval/accuracy"] <= 1 and "baseline/majority" in metrics
    assert launch.load(tmp_path / "run").model.config.head == shape


def test_a_decoder_a_published_directory_and_nothing_to_begin_with(base, run, labelled, tmp_path):
    """Other trunks: a causal one, whose last token is read; BERT's files; and fresh weights with a tokenizer of its own."""
    loaded = launch.load(run)
    hf.save(tmp_path / "bert", loaded.model, loaded.params["policy"])
    tokenizers.save(loaded.tokenizer, tmp_path / "bert")
    rows = {**SMALL, "data.path": labelled["sequence"]}
    for name, more in {
        "decoder": {"init": str(base / "pretrain"), "pool": "last"},
        "published": {"init": str(tmp_path / "bert")},
        "fresh": {k: v for k, v in TINY.items() if k not in SMALL},
    }.items():
        launch.start(classify.main, "classify", {**rows, **more}, tmp_path / name)
        assert newest_meta(tmp_path / name)["model"]["trunk"]["family"] == ("decoder" if name == "decoder" else "encoder")
    after = params_of(tmp_path / "published", "classifier")["embed"]["positions"]
    assert 0 < np.abs(np.asarray(after) - np.asarray(loaded.params["policy"]["embed"]["positions"])).max() < 0.01


def test_pretraining_with_next_sentences_is_a_trunk_too(files, labelled, tmp_path):
    launch.start(mlm.main, "mlm", {**TINY, "data.path": files["text"]}, tmp_path / "mlm", variant="tiny-nsp")
    overrides = {**SMALL, "init": str(tmp_path / "mlm"), "data.path": labelled["sequence"], "pool": "first"}
    launch.start(classify.main, "classify", overrides, tmp_path / "run")
    before, after = params_of(tmp_path / "mlm", "policy"), params_of(tmp_path / "run", "classifier")
    assert 0 < np.abs(np.asarray(after["pooler"]["kernel"]) - np.asarray(before["pooler"]["kernel"])).max() < 0.01
    # the two scores of next sentences are not taken for those of five labels
    assert before["classifier"]["kernel"].shape[1] == 2 and after["classifier"]["kernel"].shape[1] == 5
    assert all(np.isfinite(m["train/loss"]) for m in steps_of(tmp_path / "run"))


def test_built_in_tasks_are_of_the_seed_and_have_several_labels():
    for name, task in classify.TASKS.items():
        train, held_out = task(300, 100, 0)
        assert len(train) == 300 and 90 < len(held_out) <= 100 and task(300, 100, 0) == (train, held_out)
        labels = {row["label"] for row in train}
        assert {row["label"] for row in held_out} <= labels
        assert len(labels) == 3 if name == "kinds" else len(labels) > 20
        assert not {row["text"] for row in train} & {row["text"] for row in held_out}


@pytest.mark.parametrize(
    ("main", "changes", "match"),
    [
        (mlm, {"objective": "clm"}, "config.objective='clm': choose one of mlm, mlm.nsp"),
        (mlm, {"masking": "none"}, "config.masking='none': choose one of dynamic, static"),
        (mlm, {"mask_rate": 1.5}, "mask_rate=1.5: a share above 0"),
        (mlm, {"model.n_heads": 5}, "n_heads=5 does not divide model.d_model=32: use n_heads=4"),
        (mlm, {"data.length": 100}, "longer than the model's context of 64"),
        (classify, {"mode": "lora"}, "config.mode='lora': choose one of finetune, probe, scratch"),
        (classify, {"data.task": "glue", "data.path": ""}, "data.task='glue': choose one of kinds, families"),
        (classify, {"pool": "max"}, "model.pool='max': choose one of first, mean, last"),
        (classify, {"data.length": 100}, "longer than the model's context of 64"),
        (classify, {"batch_size": 64}, "batch_size=64 is more than the 32 rows"),
    ],
)
def test_settings_that_cannot_work(files, labelled, tmp_path, main, changes, match):
    path = files["text"] if main is mlm else labelled["sequence"]
    with pytest.raises(UserError, match=match):
        launch.start(main.main, main.__name__.split(".")[1], {**TINY, "data.path": path, **changes}, tmp_path / "run")


def test_published_sizes_are_variants():
    from jaxllm import settings

    for name, variants in (("mlm", ("bert-base", "roberta-large")), ("classify", ("bert-large", "roberta-base"))):
        for variant in variants:
            config = settings.load_config(settings.CONFIGS / f"{name}.py", variant)
            assert config.model.d_model in (768, 1024) and config.data.length == 512
            assert len(settings.settings_of(config)) <= 64
    with pytest.raises(ValueError, match="unknown variant 'bert-huge': choose one of tiny"):
        settings.load_config(settings.CONFIGS / "mlm.py", "bert-huge")
