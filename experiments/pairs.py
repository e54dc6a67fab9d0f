"""Collect preferences: two completions a prompt from a fine-tuned model, judged by the instr world's simulated annotator.

    python -m experiments.pairs --config.init=runs/sft

Writes train.jsonl and held_out.jsonl (prompt, chosen, rejected) into the run directory. Ties are no pairs: with
seed 0, 3,072 prompts gave 2,061 pairs to train on, 1,024 others gave 698 that are kept.
"""

from __future__ import annotations

import jax
import numpy as np

from experiments import common, completions, verifiable
from jaxllm import launch
from jaxllm.core.types import UserError
from jaxllm.worlds import instr


def collect(loaded, tasks, config, seed):
    """Preference rows for tasks; prompts on which the two completions tie for the annotator give none."""
    sample = completions.sampler(
        loaded.model, loaded.tokenizer, max_new_tokens=config.max_new_tokens, temperature=config.temperature
    )
    prompts = completions.prompt_columns(loaded.tokenizer, [t["prompt"] for t in tasks], config.max_prompt)
    keys = jax.random.split(jax.random.key(seed), 2)
    a, b = (
        completions.complete(sample, loaded.params["policy"], loaded.tokenizer, prompts, key, config.batch_size).texts
        for key in keys
    )
    rng = np.random.default_rng(seed)
    rows = []
    for task, x, y in zip(tasks, a, b, strict=True):
        better = instr.annotate(task, x, y, rng)
        if better is not None:
            chosen, rejected = (x, y) if better == 0 else (y, x)
            rows.append({"prompt": task["prompt"], "chosen": chosen, "rejected": rejected, "task": task})
    return rows


def main(config, run):
    start = common.need("sft", config.init, config, run)
    loaded = launch.load(start, default="sft")
    tasks = instr.pair_tasks(config.prompts + config.held_out, seed=config.seed)
    rows = {
        "train": collect(loaded, tasks[: config.prompts], config, config.seed),
        "held_out": collect(loaded, tasks[config.prompts :], config, config.seed + 1),
    }
    if not rows["train"]:
        raise UserError(f"{start}: no pair whose completions differ in reward: train the SFT model longer (--config.steps)")
    for name, part in rows.items():
        verifiable.write_rows(run.path(f"{name}.jsonl"), part)
        run.note(f"{name}: {len(part):,} pairs in {run.path(f'{name}.jsonl')}")
    run.finish({f"pairs/{name}": len(part) for name, part in rows.items()}, [])


if __name__ == "__main__":
    launch.run(main, "pairs")
