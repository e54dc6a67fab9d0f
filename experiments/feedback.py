"""Rounds of preferences on a policy's own samples: shared by iterative DPO and RLAIF, which differ in who judges."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import completions, dpo, reading, verifiable
from jaxllm import launch
from jaxllm.core.types import UserError
from jaxllm.data import chat
from jaxllm.data.pairs import normalise_pair
from jaxllm.data.text import first_row, placed
from jaxllm.generate.rewards import combine
from jaxllm.losses import preference
from jaxllm.train import rounds
from jaxllm.train.annotate import map_batches

SELECT = {"best_and_worst": rounds.best_and_worst, "best_and_other": rounds.best_and_other}
HELD_OUT = 256


def tasks_of(config: Any, run: Any) -> tuple[verifiable.Tasks, verifiable.Tasks]:
    """(train, held out): tasks of the instr world, problems with answers, or the prompts of rows without any."""
    if not config.data.path:
        return verifiable.split_tasks(config, run, config.prompts, HELD_OUT)
    if "answer" in first_row(config.data.path):
        return verifiable.split_tasks(config, run, config.prompts, HELD_OUT)
    places, found = zip(*reading.checked(config, run, config.data.path, placed(prompt_of)), strict=True)
    shown = [{"prompt": p if isinstance(p, str) else p[-1]["content"]} for p in found]
    tasks = verifiable.Tasks(list(found), shown, [""] * len(found), list(places), str(config.data.path))
    order = np.random.default_rng(config.seed).permutation(len(found))
    n = min(HELD_OUT, max(1, len(found) // 10))
    return verifiable.some(tasks, order[n:]), verifiable.some(tasks, order[:n])


def prompt_of(row: dict, where: str) -> Any:
    """The prompt of a preference row (its completions are not read) or of a row with `prompt`."""
    if {"chosen", "rejected"} <= set(row):
        return normalise_pair(row, where)["prompt"]
    if row.get("prompt") is None:
        have = ", ".join(row)
        raise UserError(f"{where}: fresh completions need a `prompt` (or `chosen` and `rejected`), it has {have}")
    chat.as_messages(row["prompt"], "user", f"{where}, prompt")
    return row["prompt"]


def gold_scores(tasks: verifiable.Tasks, done: completions.Completions, repeats: int) -> np.ndarray | None:
    """[p, repeats] by the tasks' own verifier, nan where it failed; None where the rows have no answer."""
    if "gold" not in tasks.rows[0]:
        return None
    functions, weights = verifiable.parse_rewards("", tasks)
    rows = [row for row in tasks.rows for _ in range(repeats)]
    scores = verifiable.score_texts(functions, weights, rows, done.texts, done.ended, done.lengths)
    return np.where(scores.valid, scores.values, np.nan).reshape(len(tasks.rows), repeats)


class Drawn(NamedTuple):
    """The run directory that drew, and its completions: `samples` neighbours for every prompt."""

    policy: str
    done: completions.Completions


def make_sample(config: Any, base: Any, tasks: verifiable.Tasks, prompts: dict, new: int) -> Callable:
    """sample(run directory, round) -> Drawn: config.samples completions of every prompt."""
    options = {"max_new_tokens": new, "temperature": config.temperature}
    draw = completions.drawer(base, prompts, config.samples, config.sample_batch, **options)

    def sample(policy: str, index: int) -> Drawn:
        params = launch.load(policy, default="sft").params["policy"]
        key = jax.random.fold_in(jax.random.key(config.seed), index)
        return Drawn(policy, draw(params, key))

    return sample


def make_select(config: Any, run: Any, tasks: verifiable.Tasks) -> Callable:
    """select(completions, scores [p, k], round) -> (preference rows, metrics). Ties, excluded and empty texts give no pair."""

    def select(drawn: Drawn, scores: np.ndarray, index: int) -> tuple[list[dict], dict[str, float]]:
        picked, use = SELECT[config.select](scores, np.random.default_rng([config.seed, index]))
        texts = np.array(drawn.done.texts, object).reshape(scores.shape)
        rows = []
        for i in np.flatnonzero(use):
            chosen, rejected = texts[i][picked[i]]
            if chosen and rejected and chosen != rejected:
                prompt = chat.as_messages(tasks.prompts[i], "user", tasks.where)
                rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        seen = {"score": float(np.nanmean(scores)), "excluded": float(np.isnan(scores).sum()), "pairs": float(len(rows))}
        return rows, seen | {"length": float(drawn.done.lengths.mean())}

    return select


def make_train(config: Any, run: Any, length: int) -> Callable:
    """train(start, policy, rows, round) -> the run <workdir>/round<i>: DPO from the policy, which is its reference too."""

    def train(start: str, policy: str, rows: list[dict], index: int) -> str:
        where = f"round{index + 1}"
        path = verifiable.write_rows(run.path("data", f"{where}.jsonl"), rows)
        if len(rows) < 4:
            run.warn(f"{where}: only {len(rows)} pairs, the model stays as it is")
            return policy
        settings = {
            "seed": config.seed + index, "init": policy, "steps": config.steps, "optim.lr": config.lr, "loss": config.loss,
            "beta": config.beta, "nll_weight": config.nll_weight, "batch_size": min(config.batch_size, len(rows) * 9 // 10),
            "data.path": path, "data.length": length,
        }  # fmt: skip
        launch.start(dpo.main, "dpo", settings, run.path(where))
        return str(run.path(where))

    return train


def make_evaluate(config: Any, base: Any, tasks: verifiable.Tasks, prompts: dict, new: int) -> Callable:
    """evaluate(run directory) -> gold (where there is a verifier), KL to the start in nats a sequence, and length, held out."""
    draw = completions.sampler(base.model, base.tokenizer, max_new_tokens=new)
    logps_of = jax.jit(partial(preference.sequence_logps, base.model))
    size = min(config.sample_batch, len(tasks.rows))

    def evaluate(policy: str) -> dict[str, float]:
        params = launch.load(policy, default="sft").params["policy"]
        done = completions.complete(draw, params, base.tokenizer, prompts, jax.random.key(config.seed + 1), size)
        record = {k: done.record[k] for k in ("tokens", "targets", "segments", "mask")}
        reference = map_batches(logps_of, base.params["policy"], record, size)
        values = {"kl": float((done.record["logps"].sum(axis=1) - reference).mean()), "length": float(done.lengths.mean())}
        gold = gold_scores(tasks, done, 1)
        return values if gold is None else {"gold": float(np.nanmean(gold)), **values}

    return evaluate


def describe(scores: combine.Scores, run: Any) -> np.ndarray:
    """The values of scores with nan where a reward was excluded, after naming what failed."""
    for line in combine.describe(scores):
        run.warn(line, once=line.split(" failed")[0])
    return np.where(scores.valid, scores.values, np.nan)
