"""Compare runs: curves over each other, settings that differ, values at the end, paired tests, where they come from.

    python -m experiments.compare runs/a runs/b
    python -m experiments.compare runs/a1 runs/a2 runs/a3 runs/b1 runs/b2 runs/b3 --out=compare.html

Runs with the same settings but for the seed are seeds of one arm: two arms with three seeds or more are tested over the seeds.
Of two runs, samples of the same prompts are tested over prompts. Nothing is concluded from one seed each, and that is said.
"""

from __future__ import annotations

import sys

from experiments.compare import paired, show
from experiments.compare.record import read, shared_metrics
from jaxllm import launch, settings
from jaxllm.core.types import UserError
from jaxllm.report.console import say
from jaxllm.report.files import write_atomic
from jaxllm.report.html import check_page

FLAGS = {"out": ""}


def run(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    items = settings.split_arguments(argv, {"debug", "help", "h"})
    runs, flags = [item.raw for item in items if item.name is None], [item.raw for item in items if item.name is not None]

    def main(out):
        if len(runs) < 2 or len(set(runs)) < len(runs):
            raise UserError(
                f"give two runs or more, each once, not {' '.join(runs) or 'none'}: experiments.compare runs/a runs/b"
            )
        path = check_page(out, "compare", "experiments.compare") if out else None
        records = [read(given) for given in runs]
        if not shared_metrics(records):
            kinds = ", ".join(f"{r.name} is a run of {r.experiment}" for r in records)
            raise UserError(f"the runs have no metric in common: {kinds}")
        tests = paired.tests_of(records)
        for line in show.text(records, tests):
            say(line)
        if path:
            write_atomic(path, show.page(records, tests))
            say(f"\npage     {path}")
        else:
            say("\nAs a page, with curves: --out=compare.html")

    launch.tool(main, "compare", FLAGS, argv=flags)


if __name__ == "__main__":
    run()
