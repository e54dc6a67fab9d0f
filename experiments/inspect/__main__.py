"""Look at rows as the model will see them: roles, the loss mask, segments, positions; of RL, rewards and advantages.

    python -m experiments.inspect --config=configs/sft.py --config.data.path=chats.jsonl --config.init=runs/pretrain
    python -m experiments.inspect --config=configs/dpo.py --rows=4 --out=inspect.html
    python -m experiments.inspect --run=runs/grpo                       # that run's data, and a rollout sampled now

The rows come from the experiment's own data functions, in the order of training. RL stages show prompts; given weights (--run, or
--config.init for GRPO) they also sample completions and show rewards and advantages. --experiment says whose config it is where
the file's name does not. Of a quickstart's run every stage is shown.
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
from jaxllm.report.html import check_page, stages_of

FLAGS = {"rows": 8, "out": "", "run": "", "experiment": ""}


def of_run(run):
    """[(config, experiment, run)] of a run directory `<dir>[@step]`, or of its stages where it has no data of its own.

    UserError when there is nothing to show.
    """
    text, _, step = run.partition("@")
    root = Path("runs/latest" if text == "latest" else text)
    if not (root / "config.json").is_file():
        raise UserError(f"--run={run}: no run directory (it has no config.json): give the directory that a run printed")
    kind = read_json(root / "env.json").get("experiment")
    if kind in tables.EXPERIMENTS:
        return [(config_of(root, kind), kind, str(root) + f"@{step}" * bool(step))]
    kinds = {stage: read_json(stage / "env.json").get("experiment") for stage in stages_of(root)}
    found = [(config_of(stage, of), of, str(stage)) for stage, of in kinds.items() if of in tables.EXPERIMENTS]
    if not found:
        raise UserError(f"--run={run}: a run of {kind}, which has no data to show and no stage that has")
    return found


def config_of(root, experiment):
    """A run's settings in the config of its experiment."""
    config = settings.load_config(settings.config_path(experiment))
    known = settings.settings_of(config)
    with config.unlocked():
        stored = flatten(read_json(root / "config.json"))
        values = {k: settings.coerce(v, known[k][0]) for k, v in stored if k in known and v is not None}
        config.update_from_flattened_dict(values)
    return config


def view(config, experiment, run, rows, root):
    """The view of a config's data; with weights, of a rollout."""
    log, directory = notes(root), run.partition("@")[0]
    with config.unlocked():
        inside(config, experiment, directory)
    if experiment in rollout.ROLLOUTS and (run or config.init):
        return rollout.ROLLOUTS[experiment](config, run, log, rows)
    data = tables.data_of(config, experiment, log, directory, rows)
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
        path = check_page(out, "inspect", "experiments.inspect") if out else None
        wanted, found = of_run(run) if run else [(config, experiment or named, "")], []
        for each in wanted:
            with tempfile.TemporaryDirectory() as root:
                found.append(view(*each, rows, root))
            for line in [""] * (len(found) > 1) + show(found[-1]):
                say(line)
        if path:
            write_atomic(path, page(found))
            say(f"\npage     {path}")
        else:
            say("\nAs a page: --out=inspect.html")

    launch.tool(main, "inspect", FLAGS, argv=argv, config="pretrain")


if __name__ == "__main__":
    run()
