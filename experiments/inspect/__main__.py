"""Look at rows as the model will see them: roles, the loss mask, segments, positions; of RL, rewards and advantages.

    python -m experiments.inspect --config=configs/sft.py --config.data.path=chats.jsonl --config.init=runs/pretrain
    python -m experiments.inspect --config=configs/dpo.py --rows=4 --out=inspect.html
    python -m experiments.inspect --run=runs/grpo                       # that run's data, and a rollout sampled now

The rows come from the experiment's own data functions, in the order of training. RL stages show prompts; given weights (--run, or
--config.init for GRPO) they also sample completions and show rewards and advantages. --experiment says whose config it is where
the file's name does not.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from experiments.inspect import rollout, tables
from experiments.inspect.page import page
from experiments.inspect.rows import view_of
from experiments.inspect.start import inside, notes
from experiments.inspect.text import show
from jaxllm import launch, settings
from jaxllm.core.types import UserError
from jaxllm.report.console import say
from jaxllm.report.files import flatten, read_json, write_atomic

FLAGS = {"rows": 8, "out": "", "run": "", "experiment": ""}
MARK = 'class="legend"'  # in every page of ours


def of_run(run):
    """(config, experiment) of a run directory. UserError when it is none."""
    root = Path("runs/latest" if run == "latest" else run.partition("@")[0])
    stored, experiment = read_json(root / "config.json"), read_json(root / "env.json").get("experiment")
    if not stored or not experiment:
        raise UserError(f"--run={run}: no run directory (it has no config.json): give the directory that a run printed")
    if not settings.config_path(experiment).is_file():
        raise UserError(f"--run={run}: a run of {experiment}, which has no config file: give one of its stages")
    config = settings.load_config(settings.config_path(experiment))
    known = settings.settings_of(config)
    with config.unlocked():
        values = {k: settings.coerce(v, known[k][0]) for k, v in flatten(stored) if k in known and v is not None}
        config.update_from_flattened_dict(values)
    return config, experiment


def check_out(out):
    """The path of --out. UserError before anything is computed when it cannot be written."""
    path = Path(out)
    if not path.parent.is_dir():
        raise UserError(f"--out={out}: no directory {path.parent}: make it first")
    if path.exists() and (path.is_dir() or MARK not in path.read_text(encoding="utf-8", errors="replace")):
        raise UserError(f"--out={out} is there and is no page of experiments.inspect: give another name")
    return path


def view(config, experiment, run, rows, root):
    """The view of a config's data; with weights, of a rollout."""
    log = notes(root)
    with config.unlocked():
        inside(config, experiment, run)
    if experiment in rollout.ROLLOUTS and (run or config.init):
        return rollout.ROLLOUTS[experiment](config, run, log, rows)
    data = tables.data_of(config, experiment, log, run, rows)
    return view_of(data, config, experiment, log.lines, rows)


def given(argv):
    """The experiment's name by the file of --config, and whether there was one."""
    items = settings.split_arguments(argv, set())
    file = next((item.value for item in reversed(items) if item.name == "config"), None)
    return Path((file or "pretrain.py").partition(":")[0]).stem, file is not None


def run(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)

    def main(config, rows, out, run, experiment):
        named, by_file = given(argv)
        if rows < 1:
            raise UserError(f"--rows={rows}: show at least 1")
        if run and by_file:
            raise UserError("give --config or --run: a run has its own config")
        path = check_out(out) if out else None
        config, experiment = of_run(run) if run else (config, experiment or named)
        with tempfile.TemporaryDirectory() as root:
            found = view(config, experiment, run, rows, root)
        for line in show(found):
            say(line)
        if path:
            write_atomic(path, page(found))
            say(f"\npage     {path}")
        else:
            say("\nAs a page: --out=inspect.html")

    launch.tool(main, "inspect", FLAGS, argv=argv, config="pretrain")


if __name__ == "__main__":
    run()
