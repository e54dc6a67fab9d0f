"""Run the commands of docs/tutorial.md in their order and write what they print into the page.

    python scripts/make_tutorial.py                 # in a temporary directory, about six minutes on two cores
    python scripts/make_tutorial.py --workdir=DIR   # finished stages in DIR only say so: give a new one

A ```console block holds one `$ command` and its output; a ```python block is followed by a ```text block with its output. Long
outputs keep their first and their last lines. A command that fails ends the script with its output, and the page as it was.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "tutorial.md"
BLOCK = re.compile(r"```console\n\$ (?P<shell>[^\n]+)\n.*?```|```python\n(?P<python>.*?)```\n\n```text\n.*?```", re.DOTALL)
FIRST, LAST, WIDTH = 6, 7, 150


def shortened(output: str) -> str:
    """The first and the last lines, none longer than a page is wide."""
    lines = [line if len(line) <= WIDTH else line[: WIDTH - 4] + " ..." for line in output.rstrip().splitlines()]
    if len(lines) > FIRST + LAST + 9:
        lines[FIRST:-LAST] = ["..."]
    return "\n".join(lines)


def run(command: list[str], workdir: Path) -> str:
    """What a command prints, in the work directory, with this checkout's jaxllm."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, cwd=workdir, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def filled(page: str, workdir: Path) -> str:
    """The page with every output as it is now."""

    def answer(block: re.Match) -> str:
        code = block["shell"] or block["python"]
        print(code.splitlines()[0], flush=True)
        if block["shell"]:
            return f"```console\n$ {code}\n{shortened(run(['bash', '-c', code], workdir))}\n```"
        return f"```python\n{code}```\n\n```text\n{shortened(run(['python', '-c', code], workdir))}\n```"

    return BLOCK.sub(answer, page)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Run docs/tutorial.md and write its outputs.")
    parser.add_argument("--workdir", type=Path, help="where the commands run (default: temporary)")
    workdir = parser.parse_args(argv).workdir or Path(tempfile.mkdtemp(prefix="tutorial-"))
    workdir.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), workdir), encoding="utf-8")
    print(f"{PAGE}: written; the runs are in {workdir}")


if __name__ == "__main__":
    sys.exit(main())
