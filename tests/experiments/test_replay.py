"""Runs that stop being finite: they end with the weights of before, and the batch they kept names what was not finite."""

import json

import jax
import numpy as np
import pytest

from experiments import common, dpo, grpo, pretrain, replay
from jaxllm import exits, launch
from jaxllm.core.types import UserError
from jaxllm.report import run as runs
from jaxllm.train.checkpoint import newest_meta, restore_params
from jaxllm.train.guard import NonFinite
from tests.experiments.conftest import TINY
from tests.experiments.test_grpo import problems as problems
from tests.experiments.test_grpo import rewards as rewards
from tests.experiments.test_stages import metrics_of


def poisoned(bad):
    """make_loader whose reference log-probabilities are nan in some steps."""
    make = common.make_loader

    def made(columns, *args, **options):
        loader = make(columns, *args, **options)

        def batch(step):
            found = loader.batch(step)
            if step not in bad:
                return found
            return jax.tree.map(lambda x: np.full_like(x, np.nan) if x.dtype == np.float32 else x, found)

        return type(loader)(loader.size, batch, loader.state)

    return made


def finite(workdir):
    return all(np.isfinite(x).all() for x in jax.tree.leaves(restore_params(workdir)[0]))


def said(capsys, batch):
    capsys.readouterr()
    replay.main(str(batch))
    return capsys.readouterr().out


def test_bad_batches_are_skipped_and_counted(base, files, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "make_loader", poisoned({2, 3}))
    given = {"steps": 8, "batch_size": 8, "init": str(base), "data.path": files["pairs"], "data.length": 32, "log_every": 1}
    launch.start(dpo.main, "dpo", given, tmp_path / "run")
    rows = {m["step"]: m for m in metrics_of(tmp_path / "run") if "train/loss" in m}
    assert [s for s, m in rows.items() if m["guard/skipped"]] == [3, 4] == [s for s, m in rows.items() if m["guard/nonfinite"]]
    assert rows[3]["train/loss"] is None and np.isfinite(rows[8]["train/loss"]) and finite(tmp_path / "run")


def test_five_in_a_row_end_it_and_the_batch_names_its_column(base, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "make_loader", poisoned(set(range(3, 99))))
    given = {"steps": 40, "batch_size": 8, "init": str(base), "data.path": files["pairs"], "data.length": 32, "log_every": 2}
    with pytest.raises(NonFinite) as error:
        launch.start(dpo.main, "dpo", given, tmp_path / "run")
    assert error.value.first == 3 and newest_meta(tmp_path / "run")["step"] == 8 and finite(tmp_path / "run")
    batch = tmp_path / "run" / "bad_batches" / "4"
    assert f"--batch={batch}" in error.value.__notes__[0]
    assert set(p.name for p in batch.iterdir()) == {"batch.npz", "step.json"}
    with runs.lock(tmp_path / "run"), pytest.raises(UserError, match="is in use by process"):  # a run that goes on has the say
        replay.main(str(batch))
    out = said(capsys, batch)
    assert "step 4 again, with the weights of the checkpoint of step 8" in out
    first = out.index("batch ref_chosen_logps has 8 of 8 numbers that are not finite")
    assert first < out.index("the loss is nan: the forward pass is not finite") < out.index("metric rewards/chosen is nan")


def test_a_learning_rate_that_is_much_too_high(files, tmp_path, capsys):
    given = {**TINY, "steps": 40, "data.path": files["text"], "optim.lr": 1e30, "optim.warmup": 0, "gates": False}
    with pytest.raises(NonFinite) as error:
        launch.start(pretrain.main, "pretrain", given, tmp_path / "run")
    assert "Usual cures: a lower config.optim.lr (now 1e+30)" in error.value.__notes__[0]
    assert finite(tmp_path / "run")
    (batch,) = (tmp_path / "run" / "bad_batches").iterdir()
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.json*")}
    out = said(capsys, batch)
    assert "the gradient of policy/embed/tokens is not finite (10 of 11 gradients)" in out and "loss is" not in out
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.json*")}  # looking changes nothing
    cured = launch.start(pretrain.main, "pretrain", given | {"optim.lr": 1e-3, "steps": 3}, tmp_path / "cured")
    assert np.isfinite(cured["metrics"]["eval/loss"])


def test_online_rl_counts_updates_and_repeats_its_rollout(base, problems, rewards, tmp_path, capsys):
    given = {
        "steps": 9, "batch_size": 4, "group": 4, "log_every": 1, "max_new_tokens": 8, "optim.lr": 1e30, "init": str(base),
        "data.path": problems, "rewards": f"{rewards}:vowels", "gates": False,
    }  # fmt: skip
    with pytest.raises(NonFinite) as error:
        launch.start(grpo.main, "grpo", given, tmp_path / "run")
    assert error.value.updates >= 5 and finite(tmp_path / "run")
    (batch,) = (tmp_path / "run" / "bad_batches").iterdir()
    out = said(capsys, batch)
    assert "update 1: the gradient of policy/" in out and "update 2: the gradient of policy/" in out


def test_the_command_says_code_and_cure(capsys):
    def work():
        error = NonFinite(6, 5)
        error.add_note("The batch is kept")
        raise error

    assert exits.guard(work, None, "again") == 70
    shown = capsys.readouterr().err
    assert "from step 7 on" in shown and "The batch is kept" in shown and "Traceback" not in shown and shown.count("\n") == 1


def test_what_is_no_batch_is_refused(tmp_path):
    with pytest.raises(UserError, match="--batch=.*give a directory under <run>/bad_batches"):
        replay.main(str(tmp_path))
    (tmp_path / "step.json").write_text(json.dumps({}))
    with pytest.raises(UserError):
        replay.main(str(tmp_path))
