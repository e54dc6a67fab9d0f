"""Where a stage's tokens come from: the run that it starts from, or what that run would have, without training it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from experiments import common, pairs, pretrain, reading
from jaxllm import launch, settings
from jaxllm.core.types import UserError
from jaxllm.data import masking
from jaxllm.data import tokenizer as tokenizers
from jaxllm.data.pairs import normalise_pair
from jaxllm.models import decoder, families
from jaxllm.train.checkpoint import newest_meta
from jaxllm.worlds import instr, instr_labelers, instr_words

BEFORE = {"sft": "pretrain", "flamingo": "pretrain"}  # which stage a run trains first where it is given none; the others need SFT


class Start(NamedTuple):
    """tokenizer; model: a record of functions, no weights; run: the run that has them, "" where there is none."""

    tokenizer: Any
    model: Any
    run: str


def notes(root: str = "") -> Any:
    """What the data functions ask of a run, which writes nothing: note and warn, kept in `lines`, and path, under root."""
    lines: list[str] = []
    warn = lambda text, once=None: lines.append(f"warning: {text}")  # noqa: E731
    return SimpleNamespace(note=lines.append, warn=warn, lines=lines, writes=False, path=lambda *parts: Path(root, *parts))


def inside(config: Any, experiment: str, run_dir: str) -> None:
    """Name in the config what a run without init trained in its own directory: the stage before it, a reward model."""
    for key, stage in (("init", BEFORE.get(experiment, "sft")), ("reward_model", "reward")):
        own = Path(run_dir) / stage
        if key in config and not config[key] and (own / "checkpoints").is_dir():
            config[key] = str(own)


def start_of(config: Any, experiment: str, run: Any, **pretraining: Any) -> Start:
    """The tokenizer and the model of config.init, or those of the run that the stage would train first.

    pretraining: what that run's config has instead of configs/pretrain.py's values ({"data.path": ...}).
    """
    if config.init:
        where, at = launch.find_stage(config.init, default=BEFORE.get(experiment, "sft"))
        meta = newest_meta(where, at)
        return Start(tokenizers.load(where / "tokenizer"), families.make(families.from_dict(meta["model"])), config.init)
    recipe = settings.load_config(settings.config_path("pretrain"))
    with recipe.unlocked():
        recipe.update_from_flattened_dict({"seed": config.seed, **pretraining})
    train, _ = pretrain.corpus(recipe, notes())
    tokenizer = pretrain.tokenizer_of(recipe, train)
    run.note("no config.init: the tokenizer is the one that a pretraining run of the default size would make")
    return Start(tokenizer, decoder.make(common.model_config(recipe, decoder.DecoderConfig, tokenizer.vocab_size)), "")


def extended(config: Any, run: Any) -> Any:
    """The tokenizer of classify's trunk in config.init."""
    if (Path(config.init) / "config.json").is_file() and list(Path(config.init).glob("*.safetensors")):
        return masking.extended(tokenizers.load(config.init))
    where, at = launch.find_stage(config.init, default="mlm")
    tokenizer, size = tokenizers.load(where / "tokenizer"), newest_meta(where, at)["model"]["vocab_size"]
    full = masking.extended(tokenizer)
    return full if full.vocab_size <= size else tokenizer


def preferences(config: Any, run: Any, start: Start, run_dir: str, shown: int) -> tuple[list[dict], str]:
    """(pairs, where they come from): the file's; those that the run collected; some drawn now from the start; stand-ins."""
    if config.data.path:
        rows = reading.checked(config, run, config.data.path, normalise_pair)
        kept = config.data.eval_path or not rows
        return (rows if kept else common.hold_out(rows, 0.1, config.seed)[0]), str(config.data.path)
    collected = Path(run_dir) / "pairs" / "train.jsonl"
    if run_dir and collected.is_file():
        return common.named_pairs(collected), str(collected)
    recipe = settings.load_config(settings.config_path("pairs"))
    tasks = instr.pair_tasks(recipe.prompts + recipe.held_out, seed=config.seed)[: recipe.prompts]
    if not start.run:
        run.note("stand-in pairs: without config.data.path and config.init a run would sample its own from the SFT model")
        return [normalise_pair(_stand_in(t, i), f"task {i + 1}") for i, t in enumerate(tasks)], "stand-ins of the instr world"
    few = tasks[: 8 * shown]
    with recipe.unlocked():
        recipe.batch_size = min(recipe.batch_size, len(few))
    rows = pairs.collect(launch.load(start.run, default="sft"), few, recipe, config.seed)
    run.note(f"pairs sampled now from {start.run} for {len(few)} prompts; a run would take {recipe.prompts:,}")
    if not rows:
        raise UserError(f"{start.run}: no pair whose completions differ in reward: train the SFT model longer (--config.steps)")
    return [normalise_pair(row, f"pair {i + 1}") for i, row in enumerate(rows)], f"samples of {start.run}"


def _stand_in(task: dict, i: int) -> dict:
    rambled = instr_labelers.ramble(instr_words.seeded("stand-in", i), task["answer"])
    return {"prompt": task["prompt"], "chosen": task["answer"], "rejected": rambled}
