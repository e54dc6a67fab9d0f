"""What the experiments on tasks and prompts sample from, and the table of all experiments whose data can be shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from experiments import completions, feedback, grpo, ppo, rejection_sampling, verifiable
from experiments.inspect import data
from experiments.inspect.data import Data
from experiments.inspect.start import start_of
from jaxllm import settings
from jaxllm.core.types import UserError
from jaxllm.data import chat


def tasks_start(config: Any, run: Any, tasks: Any) -> Any:
    """The start of an experiment on tasks: their own solutions, where they have them, are what a first run would read."""
    if config.init or not any(tasks.solutions):
        return start_of(config, "grpo", run)
    said = [(chat.as_messages(p, "user", tasks.where), s) for p, s in zip(tasks.prompts, tasks.solutions, strict=True) if s]
    texts = [{"text": m[-1]["content"] + "\n" + s} for m, s in said]
    path = verifiable.write_rows(run.path("text.jsonl"), texts)
    return start_of(config, "grpo", run, **{"data.path": path, "model.max_length": verifiable.CONTEXT})


def tasks_of(config: Any, run: Any, experiment: str) -> verifiable.Tasks:
    """The tasks that an experiment trains on."""
    if experiment == "grpo":
        grpo.check(config)
        return verifiable.split_tasks(config, run, min(8192, config.batch_size * config.steps), grpo.EVALUATED)[0]
    if experiment == "rejection_sampling":
        return verifiable.split_tasks(config, run, config.prompts, rejection_sampling.EVALUATED)[0]
    return feedback.tasks_of(config, run)[0]


def problems(config: Any, run: Any, run_dir: str, shown: int, experiment: str) -> Data:
    train = tasks_of(config, run, experiment)
    if "gold" in train.rows[0]:
        functions, weights = verifiable.parse_rewards(config.rewards if "rewards" in config else "", train)
        run.note(f"reward: {' + '.join(f'{weights[n]:g} {n}' for n in functions)}")
    start = tasks_start(config, run, train)
    new = verifiable.completion_tokens(config, start.tokenizer, train)
    train, columns = verifiable.prompt_columns(config, run, start, train, new)
    told = [chat.as_messages(p, "user", train.where) for p in train.prompts]
    answers = [str(row.get("gold", "")) for row in train.rows]
    return Data(columns | {"row": np.arange(len(told))}, start.tokenizer, train.where, {}, {"prompt": told}, answers)


def prompts(config: Any, run: Any, run_dir: str, shown: int) -> Data:
    texts, places = ppo.prompts_of(config, run)
    tokenizer = start_of(config, "ppo", run).tokenizer
    columns = completions.prompt_columns(tokenizer, texts, config.max_prompt, places)
    told = [chat.as_messages(p, "user", "prompt") for p in texts]
    where = config.data.path or "the instr world"
    return Data(columns | {"row": np.arange(len(told))}, tokenizer, where, {}, {"prompt": told})


def _problems(experiment: str) -> Callable[..., Data]:
    return lambda *given: problems(*given, experiment)


EXPERIMENTS: dict[str, Callable[[Any, Any, str, int], Data]] = {
    "pretrain": data.language, "moe": data.language, "lstm": data.language, "mlm": data.masked, "t5": data.text_to_text,
    "imagegpt": data.pixels, "flamingo": data.pictured, "classify": data.classes, "sft": data.chats, "reward": data.rewards,
    "dpo": data.pairs, "kto": data.labels, "ppo": prompts,
    **{name: _problems(name) for name in ("grpo", "rejection_sampling", "iterative_dpo", "rlaif")},
}  # fmt: skip


INSTEAD = {  # what has no data of its own to show, and what to look at
    "quickstart": "it trains one stage after another: --config=configs/sft.py shows one, --run=DIR all of a quickstart's run",
    "best_of_n": "it trains nothing: --config=configs/rejection_sampling.py with its data.path and init shows the same tasks",
    "pairs": "it trains nothing: --config=configs/dpo.py --config.data.path=DIR/train.jsonl shows what a run of it wrote",
}


def data_of(config: Any, experiment: str, run: Any, run_dir: str, shown: int) -> Data:
    """The data of an experiment, `shown` rows of which will be looked at. UserError when it has none to show."""
    if experiment in EXPERIMENTS:
        return EXPERIMENTS[experiment](config, run, run_dir, shown)
    why = INSTEAD.get(experiment, f"choose one of {', '.join(EXPERIMENTS)}")
    if settings.config_path(f"studies.{experiment}").is_file():
        why = "a study trains runs of its own below its directory: --run=DIR shows their rows, where it has kept them"
    raise UserError(f"--experiment={experiment}: no data to show: {why}")
