"""A battery of checks on your own config, model and data, before training.

    python -m experiments.doctor --config=configs/sft.py --config.init=runs/pretrain --config.data.path=chats.jsonl
    python -m experiments.doctor --config=configs/dpo.py --out=doctor.json
    python -m experiments.doctor --config=configs/sft.py --config.teach_bug=mask_off_by_one      # a known bug, found

Each check is a relation that must hold (padding changes nothing, packed rows train as separate ones, the cached pass is the full
one, ...), with the number that was measured. Exit code 0 when all hold, 2 when one fails. What a stage would have to train first
is a fresh model; large models are made small, and it says so. --simulate: CPU devices to simulate; --experiment says whose
config it is where the file's name does not; --only=padding,"cache = full" makes some of the checks.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import time
from pathlib import Path

from experiments.doctor import battery, verdict
from experiments.plan.__main__ import given
from jaxllm import launch, settings
from jaxllm.core.types import UserError
from jaxllm.report.console import say

FLAGS = {"out": "", "experiment": "", "only": "", "simulate": 2}


def prepare(flags):
    """So many simulated CPU devices, unless the environment says how many."""
    import jax

    if flags["simulate"] > 1 and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", flags["simulate"])


def chosen(only):
    """The checks of --only. UserError names the nearest of one that there is not."""
    names = [name.strip() for name in only.split(",") if name.strip()]
    for name in names:
        if name not in (known := battery.check_names()):
            near = settings.nearest(name, known)
            raise UserError(f"--only={name}: {f'did you mean {near!r}? ' if near else ''}The checks are {', '.join(known)}")
    return names


def diagnose(config, experiment, out="", only=""):
    """The verdicts on a config, printed as they come."""
    found, began, terminal = [], time.monotonic(), sys.stdout

    def tell(one):
        found.append(one)
        say(verdict.line(one), stream=terminal)

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        battery.run(config, experiment, Path(folder) / "run", tell, lambda text: say(text, stream=terminal), chosen(only))
    seconds = time.monotonic() - began
    if out:
        verdict.write(out, found, {"experiment": experiment, "seconds": round(seconds, 1)})
    return found


def run(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)

    def main(config, out, experiment, only, simulate):
        if out and not Path(out).absolute().parent.is_dir():
            raise UserError(f"--out={out}: there is no directory {Path(out).parent}: make it, or name another file")
        experiment = experiment or given(argv)[1]
        found = diagnose(config, experiment, out, only)
        failed = [v for v in found if v.ok is False]
        held = sum(v.ok is True for v in found)
        if failed:
            raise UserError("\n".join([f"{len(failed)} of {held + len(failed)} checks failed", *verdict.advice(found)]))
        say(f"{held} checks hold, {len(found) - held} do not apply")

    launch.tool(main, "doctor", FLAGS, argv=argv, config="pretrain", before=prepare)


if __name__ == "__main__":
    run()
