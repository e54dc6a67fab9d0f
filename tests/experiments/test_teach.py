"""Each taught bug is found by the check that its docstring names, and a run without one passes the same checks."""

import json
import re

import pytest

from experiments import grpo, sft, teach
from experiments.doctor import battery
from jaxllm import launch, settings
from jaxllm.core.types import UserError
from tests.conftest import ROOT
from tests.experiments.conftest import TINY

LEARNED = {**TINY, "model.positions": "learned", "mesh.data": 1}  # rotary positions do not notice an offset
STARTED = {"batch_size": 8, "data.length": 32}
RL = {"batch_size": 4, "max_new_tokens": 6, "max_prompt": 60}
# bug -> (the experiment that shows it, settings)
SHOWN = {
    "mask_off_by_one": ("sft", STARTED), "pad_is_eos": ("sft", STARTED), "train_on_prompt": ("sft", STARTED),
    "unshifted_targets": ("sft", STARTED), "double_bos": ("sft", STARTED), "empty_answers": ("sft", STARTED),
    "mean_of_means": ("sft", STARTED), "wrong_reference": ("dpo", STARTED), "reward_on_pad": ("reward", STARTED),
    "positions_not_reset": ("pretrain", LEARNED), "left_pad_positions": ("pretrain", LEARNED),
    "cache_off_by_one": ("pretrain", LEARNED), "packing_leak": ("pretrain", LEARNED), "frozen_by_mistake": ("pretrain", LEARNED),
    "missing_temperature": ("grpo", RL), "reference_follows_policy": ("grpo", RL), "kl_sign": ("grpo", RL),
}  # fmt: skip
FILES = {"pretrain": "text", "sft": "chat", "dpo": "pairs", "reward": "pairs"}


def named(bug):
    """The check that the bug's docstring promises."""
    return re.search(r"Caught\s+by\s+`([^`]+)`", teach.BUGS[bug].change.__doc__)[1]


def config_of(experiment, changes, base, files, **more):
    config = settings.load_config(settings.config_path(experiment))
    given = {} if experiment == "pretrain" else {"init": str(base)}
    given |= {"data.path": files[FILES[experiment]]} if experiment in FILES else {}
    with config.unlocked():
        config.update_from_flattened_dict({**given, **changes, **more})
    return config


def verdicts(experiment, changes, base, files, tmp_path, only, **more):
    found = []
    config = config_of(experiment, changes, base, files, **more)
    battery.run(config, experiment, tmp_path / "run", found.append, lambda text: None, only=only)
    return {v.name: v for v in found}


def test_every_bug_is_shown():
    assert set(SHOWN) == set(teach.BUGS)
    assert len(teach.BUGS) >= 10
    assert {named(bug) for bug in teach.BUGS} <= set(battery.check_names())


@pytest.mark.parametrize("bug", SHOWN)
def test_a_taught_bug_is_found_by_its_check(bug, base, files, tmp_path):
    experiment, changes = SHOWN[bug]
    found = verdicts(experiment, changes, base, files, tmp_path, [named(bug)], teach_bug=bug)
    assert found[named(bug)].ok is False, found
    assert found[named(bug)].do


@pytest.mark.parametrize("experiment", sorted({experiment for experiment, _ in SHOWN.values()}))
def test_the_same_checks_hold_without_a_bug(experiment, base, files, tmp_path):
    changes = next(c for e, c in SHOWN.values() if e == experiment)
    only = sorted({named(bug) for bug, (e, _) in SHOWN.items() if e == experiment})
    found = verdicts(experiment, changes, base, files, tmp_path, only)
    assert set(found) == set(only)
    assert all(v.ok is True for v in found.values()), found


def test_a_run_with_a_bug_says_so(base, files, tmp_path, capsys):
    given = {**STARTED, "steps": 1, "init": str(base), "data.path": files["chat"], "teach_bug": "train_on_prompt"}
    result = launch.start(sft.main, "sft", given, tmp_path / "run")
    assert result["taught_bug"] == "train_on_prompt"
    assert "THIS RUN HAS A BUG" in (tmp_path / "run" / "log.txt").read_text()
    assert "THIS RUN HAS A BUG" in capsys.readouterr().err
    clean = launch.start(sft.main, "sft", {**given, "teach_bug": ""}, tmp_path / "clean")
    assert "taught_bug" not in clean
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines()[0] for name in ("run", "clean")]
    assert len({json.loads(line)["train/loss"] for line in logs}) == 2


def test_the_gates_of_a_run_stop_what_they_can_see(base, files, tmp_path):
    given = {**RL, "steps": 1, "init": str(base), "teach_bug": "missing_temperature"}
    with pytest.raises(UserError, match="gate `sampler` failed"):
        launch.start(grpo.main, "grpo", given, tmp_path / "run")


@pytest.mark.parametrize(
    ("bug", "said"),
    [
        ("mask_of_by_one", "did you mean 'mask_off_by_one'"), ("kl_sign", "needs a KL"),
        ("wrong_reference", "finds nothing to break"), ("missing_temperature", "finds nothing to break"),
        ("reference_follows_policy", "needs a reference"),
    ],
)  # fmt: skip
def test_a_bug_that_cannot_be_put_in_is_refused(bug, said, base, files, tmp_path):
    given = {**STARTED, "steps": 1, "init": str(base), "data.path": files["chat"], "teach_bug": bug}
    with pytest.raises(UserError, match=said):
        launch.start(sft.main, "sft", given, tmp_path / "run")


def test_the_page_of_the_doctor_has_every_bug_and_every_check():
    page = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    for bug, (_, change) in teach.BUGS.items():
        what, more = (" ".join(text.split()) for text in change.__doc__.split("\n\n")[:2])
        row = re.search(rf"^\| `{bug}` \| (.+) \| (.+) \| `(.+)` \|$", page, re.MULTILINE)
        assert row[1] == what and more.startswith(row[2]) and row[3] == named(bug)
    assert re.findall(r"^\| `([^`]+)` \|", page.split("## Reading")[0], re.MULTILINE) == battery.check_names()
