"""Starting: imports, the first train step of a fresh process, and the same with the compilation cache of the one before.

python -m benchmarks.startup <starter> JSON-OF-SHAPE      one start, in this process: prints its loss
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import shape as given
from benchmarks.rows import TRL, installed
from benchmarks.shape import Shape

ROOT = Path(__file__).resolve().parents[1]


def fresh(arguments: list[str], cache: str | None = None) -> tuple[float, str]:
    """(Seconds, last line printed) of a Python process from its start to its end; `cache`: the compilation cache's directory."""
    environ = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache} if cache else dict(os.environ)
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], env=environ, cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"python {' '.join(arguments)} failed:\n{done.stderr[-4000:]}")
    return seconds, (done.stdout.strip().splitlines() or [""])[-1]


def imports(shape: Shape, rounds: int) -> dict[str, list[float]]:
    """`import jaxllm`, and what a training script imports, each over `import jax`, in processes of their own."""
    rows = {"import/jax": [], "import_training/jax": []}
    for _ in range(rounds + 1):  # the first round warms the disk
        jax, own, training = (fresh(["-c", f"import {name}"])[0] for name in ("jax", "jaxllm", "benchmarks.ours"))
        rows["import/jax"].append(own / jax)
        rows["import_training/jax"].append(training / jax)
    return {name: values[1:] for name, values in rows.items()}


def starts(shape: Shape, rounds: int) -> dict[str, list[float]]:
    """Processes from their start to their end after one train step on one row: ours with an empty compilation cache, again with
    what that left, and TRL's SFTTrainer where it is installed. Of ours also what the cache is for: compiling the step.
    """
    rows = {"first_step/trl": [], "second_start/first": [], "second_compile/first": []}
    text = json.dumps(asdict(replace(shape, batch=1)))
    for _ in range(rounds + 1):  # the first round warms the disk
        with tempfile.TemporaryDirectory() as cache:
            (cold, first), (warm, second) = (step_of("ours", text, cache) for _ in range(2))
        rows["second_start/first"].append(warm / cold)
        rows["second_compile/first"].append(second["compile"] / first["compile"])
        said = f"first start {cold:.1f} s, with a cache {warm:.1f} s"
        if installed(TRL):
            trl, theirs = step_of("trl", text)
            assert abs(theirs["loss"] - first["loss"]) < 1e-3, f"first_step/trl: losses {first} and {theirs}"
            rows["first_step/trl"].append(cold / trl)
            said += f", TRL {trl:.1f} s"
    print(f"  {said} (the last round)", flush=True)
    return {name: values[1:] for name, values in rows.items()}


def step_of(starter: str, text: str, cache: str | None = None) -> tuple[float, dict[str, float]]:
    """(Seconds, what it says) of one start in a process of its own."""
    seconds, said = fresh(["-m", "benchmarks.startup", starter, text], cache)
    return seconds, json.loads(said)


def ours(shape: Shape) -> dict[str, float]:
    """One step of the loop that all experiments run."""
    from jaxllm import launch

    launch.prepare_jax()
    import jax
    import numpy as np

    from benchmarks.ours import make_model, make_params, optimizer
    from jaxllm.data.loader import make_loader
    from jaxllm.losses import lm
    from jaxllm.train import loop
    from jaxllm.train.step import init_state, make_train_step

    tokens, _ = given.batch(shape, 0)
    inputs, full = tokens[:, :-1], (shape.batch, shape.length - 1)
    columns = {"tokens": inputs, "targets": tokens[:, 1:], "segments": np.ones(full, np.int32), "mask": np.ones(full, bool)}
    loader, tx, model = make_loader(columns, shape.batch, 0), optimizer(), make_model(shape, unroll=False)
    step = jax.jit(make_train_step(lm.loss(model), tx), donate_argnums=0)
    state, frozen = init_state({"policy": make_params(shape)}, tx)
    key, found = jax.random.key(0), {}
    began = time.perf_counter()
    step = step.lower(state, frozen, loader.batch(0), key).compile()
    seconds = time.perf_counter() - began
    loop.fit(step, state, frozen, loader.batch, key, steps=1, log=lambda i, values: found.update(values))
    return {"loss": found["loss"], "compile": seconds}


def trl(shape: Shape) -> dict[str, float]:
    """One step of SFTTrainer.train on rows that are tokens already."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from benchmarks.hugging_face import COMMON, make_model
    from benchmarks.trl_trainers import tokenizer

    tokens, _ = given.batch(shape, 0)
    args = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_steps=1, per_device_train_batch_size=shape.batch, learning_rate=given.LEARNING_RATE,
        max_length=None, **COMMON,
    )  # fmt: skip
    rows = Dataset.from_list([{"input_ids": row} for row in tokens.tolist()])
    trainer = SFTTrainer(model=make_model(shape), args=args, train_dataset=rows, processing_class=tokenizer(shape))
    loss = trainer.train().training_loss
    shifted = shape.length / (shape.length - 1)  # Trainer divides by the labels before they are shifted: one more a row
    return {"loss": float(loss) * shifted}


STARTERS: dict[str, Callable[[Shape], dict[str, Any]]] = {"ours": ours, "trl": trl}

if __name__ == "__main__":
    print(json.dumps(STARTERS[sys.argv[1]](Shape(**json.loads(sys.argv[2])))))
