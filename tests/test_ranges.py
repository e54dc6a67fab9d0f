"""Numbers that no recipe can mean."""

import subprocess
import sys
from pathlib import Path

import pytest

from jaxllm import ranges, settings

CONFIGS = sorted(p for p in settings.CONFIGS.rglob("*.py") if p.stem not in ("common", "__init__"))


@pytest.mark.parametrize(
    "name,good,bad",
    [
        ("steps", [1, 10**9], [0, -5]),
        ("batch_size", [1], [0, -4]),
        ("accumulate", [1], [0]),
        ("log_every", [1], [0, -1]),
        ("keep", [1], [0]),
        ("eval_every", [0, 5], [-1]),
        ("save_every", [0], [-1]),
        ("save_seconds", [0.0, 1.5], [-1.0]),
        ("watchdog", [0.0], [-1.0, float("inf")]),
        ("spike_sigma", [0.0], [-2.0]),
        ("seed", [0], [-1]),
        ("optim.lr", [0.0, 1e-3], [-1.0, float("inf"), float("nan")]),
        ("optim.b1", [0.0, 0.999], [1.0, 2.0, -0.1]),
        ("optim.weight_decay", [0.0], [-1.0]),
        ("hyper.label_smoothing", [0.0, 0.4], [1.5, -0.1]),
        ("optim.clip_norm", [0.5, float("inf")], [0.0, -1.0]),
        ("data.held_out", [0.0, 0.5], [1.0]),
        ("gamma", [1.0], [1.5]),
        ("hyper.gamma", [-1.0, 1.5], [float("nan")]),
        ("right", [-3.0, 0.5], [float("inf")]),
        ("mesh.data", [-1, 4], []),
        ("data.path", ["", "-1"], []),
        ("gates", [True, False], []),
    ],
)
def test_what_a_number_may_be(name, good, bad):
    assert [ranges.fault(name, value) for value in good] == [None] * len(good)
    assert all(ranges.fault(name, value) for value in bad)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(settings.CONFIGS)))
def test_no_recipe_is_refused(path):
    found = settings.settings_of(settings.load_config(path))
    assert ranges.mistakes({name: value for name, (_, value) in found.items()}) == []


def test_every_bound_is_of_a_setting():
    known = {name for path in CONFIGS for name in settings.settings_of(settings.load_config(path))}
    assert known | {name.rpartition(".")[2] for name in known} >= ranges.BOUNDS.keys()


def test_the_command_names_each_of_them_at_once(tmp_path):
    argv = ["--config.steps=-5", "--config.batch_size=0", "--config.optim.lr=-1", "--config.modle=1"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.pretrain", *argv, f"--workdir={tmp_path / 'run'}"], capture_output=True, text=True,
        cwd=Path(__file__).resolve().parents[1],
    )  # fmt: skip
    assert done.returncode == 2 and not (tmp_path / "run").exists() and "Traceback" not in done.stderr
    for words in ("steps=-5: it must be 1 or more", "batch_size=0: it must be 1", "lr=-1.0: it must be 0 or more", "modle"):
        assert words in done.stderr, done.stderr


def test_a_config_file_of_ones_own_is_read_as_closely(tmp_path):
    text = "import ml_collections\n\ndef get_config():\n    return ml_collections.ConfigDict({'keep': 0})\n"
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match="keep=0: it must be 1 or more"):
        settings.parse([f"--config={tmp_path / 'mine.py'}"], "sft", {})
