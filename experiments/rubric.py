"""A language model as the judge: what it is asked, and its expected rating from the probabilities of five tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import sft, verifiable
from jaxllm import launch
from jaxllm.core import ops
from jaxllm.core.types import Params, UserError
from jaxllm.data import chat
from jaxllm.train.annotate import map_batches
from jaxllm.worlds import instr
from jaxllm.worlds.instr_rubric import ASPECTS, rated

LEVELS = ("1", "2", "3", "4", "5")


def ask(instruction: str, answer: str, aspect: str) -> str:
    """What the judge reads."""
    return f"{instruction}\nanswer: {answer}\nrate its {aspect}, 1 to 5:"


def revise(instruction: str, answer: str, aspect: str) -> str:
    """What the reviser reads: the critique is the aspect that fell short."""
    return f"{instruction}\nanswer: {answer}\nrewrite it for more {aspect}:"


def levels_of(tokenizer: Any) -> tuple[list[int], list[int]]:
    """(tokens that come before a rating, the five tokens that tell ratings apart) in the chat format. UserError if none do."""
    prompt = len(chat.prompt_ids(tokenizer, "rate it"))
    tails = [
        chat.encode_chat(tokenizer, [{"role": "user", "content": "rate it"}, {"role": "assistant", "content": level}]).tokens
        for level in LEVELS
    ]
    tails = [tail[prompt:].tolist() for tail in tails]
    at = next((i for i in range(min(map(len, tails))) if len({tail[i] for tail in tails}) > 1), 0)
    ids = [tail[at] for tail in tails]
    if len(set(ids)) < len(LEVELS):
        raise UserError(f"the tokenizer does not tell the ratings {', '.join(LEVELS)} apart in one token: use another judge")
    return tails[0][:at], ids


def make_judge(model: Any, tokenizer: Any, batch: int) -> Callable[[Params, list[str]], np.ndarray]:
    """judge(params, questions) -> the expected rating [n]: sum over levels of level * p(level), renormalised over the five.

    UserError when a question is longer than the judge's context.
    """
    before, ids = levels_of(tokenizer)

    @jax.jit
    def expected(params: Params, columns: dict) -> jax.Array:
        real = (jnp.arange(columns["tokens"].shape[1])[None, :] < columns["lengths"][:, None]).astype(jnp.int32)
        hidden = model.apply(params, columns["tokens"], segments=real).hidden
        last = jnp.take_along_axis(hidden, (columns["lengths"] - 1)[:, None, None], axis=1)[:, 0]
        probs = jax.nn.softmax(ops.logits(model.head(params), last)[:, jnp.asarray(ids)], axis=-1)
        return probs @ jnp.arange(1.0, len(ids) + 1)

    def judge(params: Params, questions: list[str]) -> np.ndarray:
        tokens = [[*chat.prompt_ids(tokenizer, q).tolist(), *before] for q in questions]
        lengths = np.array([len(t) for t in tokens], np.int32)
        if (most := lengths.max()) > model.config.max_length:
            raise UserError(f"the judge reads {model.config.max_length} tokens, a question has {most}: lower max_new_tokens")
        columns = np.zeros((len(tokens), -(-most // 16) * 16), np.int32)
        for row, t in zip(columns, tokens, strict=True):
            row[: len(t)] = t
        return map_batches(expected, params, {"tokens": columns, "lengths": lengths}, batch)

    return judge


def rating_rows(config, demonstrations):
    """SFT rows of ratings and revisions by simulated raters; with demonstrations too, so that a policy stays one."""
    rows = []
    for row in rated(config.judge_rows, seed=config.seed + 11):
        given = row["task"]["prompt"], row["text"]
        for aspect in ASPECTS:
            rows.append((ask(*given, aspect), str(row["ratings"][aspect])))
        rows.append((revise(*given, min(row["ratings"], key=row["ratings"].get)), row["better"]))
    chats = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in rows]
    return chats + (instr.demonstrations(len(chats) // 2, seed=config.seed + 12) if demonstrations else [])


def train_judge(config, run, start, *, demonstrations=False):
    """The run <workdir>/judge, fine-tuned from `start` on ratings."""
    if config.data.path and not demonstrations:
        run.note("no judge given: training one on the instr world's ratings, which know nothing of your prompts")
    at = launch.load(start, default="sft")  # of a directory with stages, `sft` by itself would start from the pretrained one
    path = verifiable.write_rows(run.path("data", "ratings.jsonl"), rating_rows(config, demonstrations))
    settings = {
        "init": f"{at.workdir}@{at.step}",
        "steps": config.judge_steps,
        "seed": config.seed,
        "data.path": path,
        "data.length": config.judge_length,
    }
    launch.start(sft.main, "sft", settings | {"eval_every": 0}, run.path("judge"))
    return str(run.path("judge"))


def make_rater(config, loaded):
    """rate(params, instructions, answers) -> ratings [n, aspects]."""
    judge = make_judge(loaded.model, loaded.tokenizer, config.sample_batch)

    def rate(params, instructions, answers):
        questions = [ask(i, a, aspect) for i, a in zip(instructions, answers, strict=True) for aspect in ASPECTS]
        return judge(params, questions).reshape(len(answers), len(ASPECTS))

    return rate


def pair_agreement(scores, gold):
    """How often scores [p, k] order two answers to one prompt as gold does, over pairs with unlike gold; ties count half."""
    i, j = np.triu_indices(scores.shape[1], 1)
    a, b = scores[:, i] - scores[:, j], gold[:, i] - gold[:, j]
    unlike = np.abs(np.nan_to_num(b)) > 1e-6
    right = (np.sign(a) == np.sign(b)) + 0.5 * (a == 0)
    return float(right[unlike].mean()) if unlike.any() else float("nan")
