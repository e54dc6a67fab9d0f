"""Execute a notebook from top to bottom in a fresh kernel; the file itself is not changed.

    python scripts/run_notebook.py notebooks/01_life_cycle.ipynb
    python scripts/run_notebook.py notebooks/01_life_cycle.ipynb --size=cpu --out=done.ipynb

The kernel runs in the work directory with JAXLLM_NOTEBOOK_SIZE and JAXLLM_NOTEBOOK_WORKDIR set, and
imports the jaxllm of this checkout. Exit codes: 0 every cell ran, 1 a cell failed (its source and its error
are printed), 2 bad input.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CELL_SECONDS = 900


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Execute a notebook in a fresh kernel.")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--workdir", type=Path, help="where the kernel runs (default: temporary)")
    parser.add_argument("--size", default="ci", help="JAXLLM_NOTEBOOK_SIZE (default: ci)")
    parser.add_argument("--out", type=Path, help="save the executed copy, with its outputs, here")
    return parser.parse_args(argv)


def environment(workdir: Path, size: str) -> dict[str, str]:
    """This environment with the notebook's variables; this checkout comes before an installed jaxllm."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"JAXLLM_NOTEBOOK_SIZE": size, "JAXLLM_NOTEBOOK_WORKDIR": str(workdir)}
    return {**os.environ, **own, "PYTHONPATH": os.pathsep.join(paths)}


def run_cells(client, cells: list) -> int | None:
    """Execute the code cells with a line for each; the index of the first that fails, or None."""
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    for i, cell in enumerate(cells):
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        title, began = cell.source.strip().splitlines()[0][:80], time.monotonic()
        try:
            client.execute_cell(cell, i)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            print(f"cell {i + 1}/{len(cells)} failed after {time.monotonic() - began:.1f} s", flush=True)
            print(f"---- source\n{cell.source}\n---- error\n{error}", file=sys.stderr, flush=True)
            return i
        print(f"cell {i + 1:2}/{len(cells)} {time.monotonic() - began:7.1f} s  {title}", flush=True)
    return None


def execute(notebook, workdir: Path, size: str) -> int | None:
    """Run the notebook's cells in their own kernel of this Python; the index of a failed cell, or None."""
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    # no kernel directories: a user's own "python3" kernel may be another interpreter
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    quiet = ["--IPKernelApp.log_level=ERROR"]
    client = NotebookClient(notebook, km=manager, timeout=CELL_SECONDS, extra_arguments=quiet)
    with client.setup_kernel(cwd=str(workdir), env=environment(workdir, size)):
        return run_cells(client, notebook.cells)


def main(argv: list[str] | None = None) -> int:
    given = arguments(argv)
    try:
        import ipykernel  # noqa: F401
        import nbclient  # noqa: F401
        import nbformat
    except ImportError as error:
        print(f'error: {error}: pip install -e ".[dev]" installs what runs notebooks', file=sys.stderr)
        return 2
    try:
        notebook = nbformat.read(given.notebook, as_version=4)
    except (OSError, nbformat.reader.NotJSONError) as error:
        print(f"error: {given.notebook} is no notebook that can be read: {error}", file=sys.stderr)
        return 2
    workdir = (given.workdir or Path(tempfile.mkdtemp(prefix="notebook-"))).absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    failed = execute(notebook, workdir, given.size)
    if given.out:
        nbformat.write(notebook, given.out)
    if failed is None:
        print(f"{given.notebook}: every cell ran, {time.monotonic() - began:.0f} s, work directory {workdir}")
    return int(failed is not None)


if __name__ == "__main__":
    sys.exit(main())
