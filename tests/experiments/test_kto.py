"""KTO from labelled rows, from pairs, and with the other losses; preference variants; rows of another kind."""

import json
import math

import numpy as np
import pytest

from configs.dpo import VARIANTS, get_config
from experiments import dpo, kto, pairs, sft
from jaxllm import launch
from jaxllm.core.tree import flatten
from jaxllm.core.types import UserError
from tests.experiments.conftest import MESH, write_rows
from tests.experiments.test_stages import metrics_of, moved, params_of

SMALL = {"steps": 3, "batch_size": 8, "log_every": 1, "data.length": 32, **MESH}


@pytest.fixture(scope="module")
def labelled(files, tmp_path_factory):
    """A file of labelled rows, two good ones for each bad one."""
    with open(files["pairs"]) as f:
        given = [json.loads(line) for line in f]
    rows = [{"prompt": p["prompt"], "completion": p["chosen"], "label": True} for p in given]
    rows += [{"prompt": p["prompt"], "completion": p["rejected"], "label": False} for p in given[::2]]
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)


def test_kto_begins_at_the_reference_and_trains(base, labelled):
    launch.start(kto.main, "kto", {**SMALL, "init": str(base), "data.path": labelled}, base / "kto")
    first, *_, last = [m for m in metrics_of(base / "kto") if "train/loss" in m]
    assert first["train/loss"] == pytest.approx(0.5, abs=1e-5)
    assert first["train/kl"] == pytest.approx(0, abs=1e-4) and first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert (
        last["step"] == 3
        and math.isfinite(last["train/loss"])
        and {"rewards/margins", "logps/rejected", "rows/empty"} <= set(last)
    )
    assert moved(params_of(base / "sft", "policy"), params_of(base / "kto", "policy")) > 0


def test_without_a_file_the_pairs_of_the_world_are_taken_apart(base, tmp_path, monkeypatch):
    def collect(config, run):
        rows = [{"prompt": f"say {i}", "chosen": f"{i}", "rejected": "no"} for i in range(20)]
        write_rows(run.path("train.jsonl"), rows)
        run.finish({}, [])

    monkeypatch.setattr(pairs, "main", collect)
    launch.start(kto.main, "kto", {**SMALL, "steps": 1, "init": str(base)}, tmp_path / "kto")
    (step,) = [m for m in metrics_of(tmp_path / "kto") if "train/loss" in m]
    assert step["train/loss"] == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("loss,start", [("bco", math.log(2)), ("apo_zero_unpaired", 0.5)])
def test_the_siblings_of_kto_train_from_pairs(base, files, tmp_path, loss, start):
    overrides = {**SMALL, "steps": 1, "init": str(base), "data.path": files["pairs"], "loss": loss}
    launch.start(kto.main, "kto", overrides, tmp_path / loss)
    (step,) = [m for m in metrics_of(tmp_path / loss) if "train/loss" in m]
    assert step["train/loss"] == pytest.approx(start, abs=1e-4) and step["train/grad_norm"] > 0


@pytest.mark.parametrize("loss", ["ipo", "orpo", "ld_dpo", "wpo"])
def test_preference_losses_of_every_kind_train(base, files, tmp_path, loss):
    overrides = {**SMALL, "steps": 1, "init": str(base), "data.path": files["pairs"], "loss": loss}
    launch.start(dpo.main, "dpo", overrides, tmp_path / loss)
    (step,) = [m for m in metrics_of(tmp_path / loss) if "train/loss" in m]
    assert math.isfinite(step["train/loss"]) and step["train/grad_norm"] > 0
    assert step["pairs/identical"] == step["pairs/empty"] == 0


@pytest.mark.parametrize("experiment", [dpo, kto], ids=["dpo", "kto"])
def test_adapters_alone_are_trained(base, files, tmp_path, experiment):
    name = experiment.__name__.rpartition(".")[2]
    overrides = {**SMALL, "steps": 2, "init": str(base), "data.path": files["pairs"], "lora.rank": 2}
    launch.start(experiment.main, name, overrides, tmp_path / name)
    after = params_of(tmp_path / name, "policy")
    adapters = after.pop("lora")
    assert moved(params_of(base / "sft", "policy"), after) == 0
    assert any(np.abs(np.asarray(x)).max() > 0 for path, x in flatten(adapters).items() if path.endswith("b"))


@pytest.mark.parametrize("name", [*dpo.LOSSES, *dpo.BUILDERS])
def test_every_preference_loss_is_built_from_the_config(name):
    config = get_config()
    config.loss = name
    build, score = dpo.objective(config)
    assert callable(build(None)) and callable(score)


def settings(tree):
    return sum(settings(v) if hasattr(v, "items") else 1 for v in tree.values())


def test_variants_and_unknown_losses():
    for name in VARIANTS:
        config = get_config(name)
        assert config.loss == name and settings(config) <= 47
        dpo.objective(config)
    assert (get_config("alphapo").beta, get_config("alphapo").hyper.alpha, get_config("orpo").nll_weight) == (2.0, 0.25, 1.0)
    with pytest.raises(UserError, match="unknown variant 'dop'.*simpo"):
        get_config("dop")
    config = get_config()
    config.loss = "simp"
    with pytest.raises(UserError, match="config.loss='simp'.*simpo.*ld_dpo"):
        dpo.objective(config)


def test_an_unknown_loss_on_rows_is_named(tmp_path):
    with pytest.raises(UserError, match="config.loss='dpo': choose one of kto, bco"):
        launch.start(kto.main, "kto", {"loss": "dpo"}, tmp_path / "kto")


def test_rows_of_another_kind_name_the_right_experiment(files, labelled, tmp_path):
    cases = [
        (kto, "kto", files["chat"], "experiments.sft"),
        (dpo, "dpo", labelled, "experiments.kto"),
        (sft, "sft", labelled, "experiments.kto"),
    ]
    for experiment, name, path, right in cases:
        with pytest.raises(UserError, match=rf"jsonl:1 .*{right}"):
            launch.start(experiment.main, name, {"data.path": path, "init": "nowhere"}, tmp_path / name)
