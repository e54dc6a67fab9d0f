"""The claims of the life cycle, measured on test-only prompts with a simulated annotator."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import completions
from jaxllm import launch
from jaxllm.data import pairs, text
from jaxllm.evals.reward_checks import calibration as calibration
from jaxllm.losses import preference, reward
from jaxllm.models import heads
from jaxllm.train.annotate import map_batches
from jaxllm.worlds import instr

BATCH = 256
MAX_PROMPT, MAX_NEW = 40, 36


def scores_of(tasks: list, out: Any) -> dict[str, np.ndarray]:
    """The world's scores of completions, one array per score."""
    rows = [instr.score(t, x, bool(e)) for t, x, e in zip(tasks, out.texts, out.ended, strict=True)]
    return {name: np.array([float(r[name]) for r in rows]) for name in rows[0]}


def complete(
    loaded: Any, tasks: list, seed: int, *, temperature: float = 1.0, raw: bool = False, cache: dict | None = None
) -> Any:
    """Completions of tasks by a checkpoint, in the chat format or on raw documents."""
    cache = {} if cache is None else cache
    if temperature not in cache:
        cache[temperature] = completions.sampler(loaded.model, loaded.tokenizer, max_new_tokens=MAX_NEW, temperature=temperature)
    ids = [np.array(loaded.tokenizer.encode(instr.raw_prompt(t))) if raw else t["prompt"] for t in tasks]
    prompts = completions.prompt_columns(loaded.tokenizer, ids, MAX_PROMPT)
    return completions.complete(
        cache[temperature], loaded.params["policy"], loaded.tokenizer, prompts, jax.random.key(seed), BATCH
    )


def judge_base(base: Any, sft: Any, config: Any, cache: dict) -> dict[str, float]:
    """Base against SFT: does it answer at all, in format, exactly."""
    n = config.test_prompts
    tasks = instr.tasks("test", n, seed=config.seed)
    plain = instr.tasks("test", n, seed=config.seed + 1, kinds=("plain",))
    template = instr.tasks("template", n, seed=config.seed, kinds=("plain",))
    family = instr.tasks("family", n, seed=config.seed, kinds=("plain",))
    m = {
        "base/answered_raw": scores_of(tasks, complete(base, tasks, 1, raw=True, cache=cache))["answered"].mean(),
        "base/answered_chat": scores_of(tasks, complete(base, tasks, 2, cache=cache))["answered"].mean(),
        "sft/in_format": scores_of(tasks, complete(sft, tasks, 2, cache=cache))["in_format"].mean(),
    }
    for name, loaded in (("base", base), ("sft", sft)):
        for split, some in (("test", plain), ("template", template), ("family", family)):
            exact = scores_of(some, complete(loaded, some, 0, temperature=0.0, cache=cache))["exact"]
            m[f"{name}/greedy_exact_{split}"] = exact.mean()
    return {k: float(v) for k, v in m.items()}


def judge_policy(loaded: Any, reference: Any, config: Any, cache: dict) -> dict[str, np.ndarray]:
    """Per-prompt scores of one policy at temperature 1, with lengths and KL to the reference in nats per sequence."""
    tasks = instr.tasks("test", config.test_prompts, seed=config.seed)
    out = complete(loaded, tasks, config.seed + 3, cache=cache)
    logps = map_batches(
        jax.jit(partial(preference.sequence_logps, reference.model)), reference.params["policy"],
        {k: out.record[k] for k in ("tokens", "targets", "segments", "mask")}, BATCH,
    )  # fmt: skip
    return {
        **scores_of(tasks, out), "length": out.lengths.astype(float), "kl": out.record["logps"].sum(axis=1) - logps,
        "kind": np.array([t["kind"] for t in tasks]), "text": np.array(out.texts, object),
        "prompt": np.array([t["prompt"] for t in tasks], object),
    }  # fmt: skip


def summary(name: str, s: dict[str, np.ndarray]) -> dict[str, float]:
    """The means that the claims are about."""
    kinds = {k: s["kind"] == k for k in ("unsafe", "lookalike", "plain")}
    m = {
        "gold": s["gold"].mean(),
        "gold_se": _se(s["gold"]),
        "length": s["length"].mean(),
        "kl": s["kl"].mean(),
        "filler": s["filler"].mean(),
    }
    m |= {f"refused_{k}": s["refused"][where].mean() for k, where in kinds.items()}
    m |= {"exact": s["exact"][kinds["plain"]].mean(), "gibberish": s["gibberish"][kinds["unsafe"]].mean()}
    return {f"{name}/{k}": float(v) for k, v in m.items()}


def _se(x: np.ndarray) -> float:
    return float(x.std(ddof=1) / len(x) ** 0.5)


def paired(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Mean of a - b over the same prompts, and its standard error."""
    return float((a - b).mean()), _se(a - b)


def judge_reward(judge: Any, sft: Any, held_out: Path) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Accuracy on held-out pairs of the reward model, of length alone and of SFT's own log-probability; the calibration data."""
    rows = text.read_rows(held_out)
    columns, _ = pairs.encode_pairs(sft.tokenizer, rows, 64)
    model = judge.model
    score = jax.jit(partial(reward.score, partial(heads.scalars, model)))
    logp = jax.jit(partial(preference.sequence_logps, sft.model))
    sides = [columns["chosen"], columns["rejected"]]
    r = [map_batches(score, judge.params["reward"], side, BATCH) for side in sides]
    p = [map_batches(logp, sft.params["policy"], side, BATCH) for side in sides]
    lengths = [side["mask"].sum(axis=1) for side in sides]
    m = {
        "reward/accuracy": _accuracy(r[0], r[1]),
        # which way length points is read off the pairs themselves: the baseline at its best
        "reward/length_only_accuracy": max(_accuracy(*lengths), _accuracy(*lengths[::-1])),
        "reward/sft_logp_accuracy": _accuracy(*p),
        "reward/pairs": float(len(rows)),
    }
    return m, {"margin": r[0] - r[1]}


def _accuracy(chosen: np.ndarray, rejected: np.ndarray) -> float:
    return float((chosen > rejected).mean() + 0.5 * (chosen == rejected).mean())


def load_all(workdir: Path) -> dict[str, Any]:
    return {stage: launch.load(workdir, stage) for stage in ("pretrain", "sft", "reward", "dpo", "ppo")}
