"""Memory, FLOPs and communication of a training step on hardware that is not there, by compiling the real step for it.

    python -m experiments.plan --config=configs/pretrain.py:1b --topology=v5e:4x4         # needs pip install -e ".[tpu]"
    python -m experiments.plan --config=configs/dpo.py --model=llama3.1-8b --topology=v5p:4x4x4 --config.data.length=2048
    python -m experiments.plan --config=configs/grpo.py --simulate=8 --model=tiny

Mesh axes left at 1 go to fsdp and the batch is scaled to divide. Where it does not fit, changes are tried until one does.
--model names the architecture for stages that start from a run; --out writes JSON, --hlo the
optimised program; --experiment says whose config it is where the file's name does not.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from experiments.plan import machine as machines
from experiments.plan import show, suggest
from experiments.plan.plan import made
from jaxllm import launch, settings
from jaxllm.core.types import UserError
from jaxllm.report.console import say

FLAGS = {"topology": "", "simulate": 0, "model": "", "experiment": "", "out": "", "hlo": ""}


def given(argv):
    """(the file of --config, its experiment's name, overrides as written) of a command line."""
    items = settings.split_arguments(argv, set())
    file = next((item.value for item in reversed(items) if item.name == "config"), "configs/pretrain.py")
    own = [item for item in items if (item.name or "").startswith("config.") and item.value is not None]
    over = {item.name.removeprefix("config."): item.value for item in own}
    return file, Path(file.partition(":")[0]).stem, over


def training_command(argv, experiment, changes, started):
    """The command that trains as planned."""
    file, _, over = given(argv)
    values = {**over, **{name: str(value) for name, value in changes.items()}}
    words = ["python", "-m", f"experiments.{experiment}", f"--config={file}"]
    words += ["--config.init=RUN"] if started and "init" not in over else []
    return shlex.join([*words, *(f"--config.{name}={value}" for name, value in values.items())])


def advise(plan, config, experiment, model, machine):
    """What to do about a plan that does not fit: (machine, plan) that does. UserError with the numbers when nothing helps."""
    say(f"\nIt does not fit: {plan.peak / 2**30:.2f} GiB a device, {machine.memory / 2**30:.1f} GiB are there")
    if (better := suggest.first_that_fits(plan, config, experiment, model, machine, say)) is not None:
        say(f"It fits with {suggest.flags(better.changes)}")
        return machine, better
    larger = suggest.larger(plan, config, experiment, model, machine, say)
    state = plan.shares["parameters"] + plan.shares["optimizer"] + plan.shares["beside the step"]
    numbers = (
        f"{machine.name} cannot hold it: of {machine.memory / 2**30:.1f} GiB a device, weights and moments take "
        f"{state / 2**30:.2f} GiB and the step {plan.peak / 2**30:.2f} GiB"
    )
    if larger is None:
        raise UserError(f"{numbers}; no larger slice of this chip was found to hold it: use a smaller model")
    say(f"{numbers}; it fits on {larger[0].name}")
    return larger


def run(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)

    def main(config, topology, simulate, model, experiment, out, hlo):
        experiment = experiment or given(argv)[1]
        machine = machines.find(topology, simulate)
        plan = made(config, experiment, model, machine)
        show.show(plan, machine)
        asked, on = plan.fits(machine), machine
        if not asked:
            on, plan = advise(plan, config, experiment, model, machine)
            show.show(plan, on)
        command = training_command(argv, experiment, plan.changes, model or "init" in config and experiment != "t5")
        say(f"\nTrain on {on.name} with:\n  {command}")
        if hlo:
            Path(hlo).write_text(plan.program.text, encoding="utf-8")
        if out:
            show.write(plan, on, command, out, {"asked": machine.name, "asked_fits": asked})

    launch.tool(main, "plan", FLAGS, argv=argv, config="pretrain", before=machines.prepare)


if __name__ == "__main__":
    run()
