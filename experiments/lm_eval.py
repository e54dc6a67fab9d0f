"""Evaluate a checkpoint with lm-eval, on data that are here.

    python -m experiments.lm_eval --run=runs/quickstart --stage=pretrain --tasks=blimp_adjunct_island --blimp=DIR
    python -m experiments.lm_eval --run=runs/quickstart --tasks=my_task.yaml --limit=100 --out=results.json

--tasks: names or YAML files of lm-eval, separated by commas; with --blimp, a directory of BLiMP's files (<paradigm>.jsonl or
.jsonl.gz), `blimp_<paradigm>` and `blimp` (all of them) mean these. See docs/serving.md.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from jaxllm import launch
from jaxllm.core.types import UserError
from jaxllm.report.files import dump, write_atomic


def blimp_task(path: Path) -> dict[str, Any]:
    """lm-eval's BLiMP task of one paradigm over a local file: which of two sentences is likelier."""
    name = f"blimp_{path.name.partition('.')[0]}"
    return {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"train": str(path.resolve())}},
        "output_type": "multiple_choice", "validation_split": "train", "num_fewshot": 0, "doc_to_text": "", "doc_to_target": 0,
        "target_delimiter": "",  # a sentence begins its document: the harness's own task puts a space before it
        "doc_to_choice": "{{[sentence_good, sentence_bad]}}", "metadata": {"version": 1.0},
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip


def chosen(tasks: str, blimp: str) -> list[str | dict[str, Any]]:
    """What lm-eval is to run. UserError names a file or a paradigm that is not there."""
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UserError("--tasks names nothing: give lm-eval's tasks or YAML files, separated by commas")
    if blimp and not Path(blimp).is_dir():
        raise UserError(f"--blimp={blimp}: no such directory")
    files = {f"blimp_{p.name.partition('.')[0]}": p for p in sorted(Path(blimp).glob("*.jsonl*"))} if blimp else {}
    found: list[str | dict[str, Any]] = []
    for name in names:
        if name == "blimp" and files:
            found += map(blimp_task, files.values())
        elif name in files:
            found.append(blimp_task(files[name]))
        elif blimp and name.startswith("blimp"):
            raise UserError(f"{blimp} has no file for {name}: it has {', '.join(list(files)[:5]) or 'no *.jsonl'} ...")
        elif name.endswith((".yaml", ".yml")) and not Path(name).is_file():
            raise UserError(f"--tasks={name}: no such file")
        else:
            found.append(name)
    return found


def evaluate(lm: Any, tasks: list[str | dict[str, Any]], limit: int = 0, samples: bool = False) -> dict[str, Any]:
    """lm-eval's results. The harness's own tasks are indexed only when one of them is asked for: that takes a while."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    own = any(isinstance(task, str) and not Path(task).is_file() for task in tasks)
    manager = TaskManager(include_defaults=own)
    try:
        return simple_evaluate(
            lm, tasks=tasks, limit=limit or None, bootstrap_iters=1000, log_samples=samples, task_manager=manager
        )
    except (KeyError, ConnectionError, FileNotFoundError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"a task cannot be loaded: {reason}; only data on this machine are read") from error


def table(results: dict[str, Any]) -> list[str]:
    """One line a metric: task, metric, value, its standard error where there is one."""
    lines = []
    for task, values in sorted(results["results"].items()):
        for key, value in values.items():
            name, _, rule = key.partition(",")
            if isinstance(value, float) and not name.endswith("_stderr"):
                error = values.get(f"{name}_stderr,{rule}")
                lines.append(f"{task:48s} {name:16s} {value:8.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else ""))
    return lines


def main(run: str, stage: str, tasks: str, blimp: str, limit: int, batch_size: int, out: str) -> None:
    asked = chosen(tasks, blimp)
    if out and Path(out).exists():
        raise UserError(f"--out={out} is there already: choose another name")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-eval is not installed: pip install 'jaxllm[lm-eval]'")
    from experiments import chat as chatting
    from experiments.lm_eval_adapter import JaxLM

    lm = JaxLM(run, stage, batch_size)
    print(chatting.about(lm.loaded))
    results = evaluate(lm, asked, limit)
    print("\n".join(table(results)))
    if out:
        write_atomic(Path(out), dump({"run": str(lm.loaded.workdir), "step": lm.loaded.step, **results}))


FLAGS = {"run": "latest", "stage": "", "tasks": "", "blimp": "", "limit": 0, "batch_size": 16, "out": ""}

if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched unless the user says so
    launch.tool(main, "lm_eval", FLAGS)
