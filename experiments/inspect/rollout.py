"""A rollout of PPO or GRPO made on the spot by the experiments' own functions: completions with rewards and advantages."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import common, completions, grpo, ppo, verifiable
from experiments.inspect.roles import with_roles
from experiments.inspect.rows import View, example_of, first_rows
from experiments.inspect.tables import tasks_of
from experiments.inspect.tokens import Part, Shown, sequence
from jaxllm import launch
from jaxllm.core.types import UserError
from jaxllm.data import chat
from jaxllm.data.pack import histogram
from jaxllm.losses import policy
from jaxllm.models import heads


def trained(run_dir: str, base: Any, log: Any, mesh: Any) -> Any:
    """The run's own checkpoint where it has one, else the one that it starts from."""
    if run_dir and (Path(run_dir.partition("@")[0]) / "checkpoints").is_dir():
        found = launch.load(run_dir, mesh=mesh)
        log.note(f"sampled from {found.workdir} at step {found.step}")
        return found
    log.note(f"sampled from {base.workdir} at step {base.step}, where the run would start")
    return base


def group(config: Any, run_dir: str, log: Any, rows: int) -> View:
    """GRPO and its siblings: groups of completions of the first prompts."""
    train = tasks_of(config, log, "grpo")
    functions, weights = verifiable.parse_rewards(config.rewards, train)
    with common.open_mesh(config) as mesh:
        base = launch.load(config.init, default="sft", mesh=mesh)
        now = trained(run_dir, base, log, mesh)
        new = verifiable.completion_tokens(config, base.tokenizer, train)
        train, columns = verifiable.prompt_columns(config, log, base, train, new)
        columns["row"] = np.arange(len(train.rows), dtype=np.int32)
        index = first_rows(columns, config, max(1, rows // config.group))
        draw = partial(completions.sampler, base.model, base.tokenizer, max_new_tokens=new)
        sample = draw(group=config.group, temperature=config.temperature, top_p=config.top_p)
        greedy = draw(temperature=0.0) if config.advantage == "remax" else None

        def score(samples, at):
            return verifiable.score_texts(
                functions, weights, [train.rows[i] for i in at], *verifiable.decode(base.tokenizer, samples)
            )

        reward, take = grpo.make_reward(log, score)
        rollout = grpo.make_rollout(config, sample, greedy, lambda params: params["policy"])
        prepare = grpo.make_prepare(config, base.model, new, grpo.nucleus(config.top_p), lambda params: params, take)
        params, frozen = {"policy": now.params["policy"]}, {"reference": base.params["policy"]}
        samples = rollout(params, common.take(columns, index), jax.random.key(config.seed))
        rewards = reward(frozen, samples)
        batch, _ = jax.device_get(prepare(params, frozen, samples, rewards))
    log.note(f"reward: {' + '.join(f'{weights[n]:g} {n}' for n in functions)}")
    if config.advantage in ("batch_mean", "reinforce_pp"):
        log.note(f"advantages are relative to these {len(batch['tokens'])} completions, in training to the whole batch")
    values = np.where(rewards["valid"], rewards["values"], np.nan)
    told = [chat.as_messages(train.prompts[i], "user", train.where) for i in index]
    answers = [str(train.rows[i].get("gold", "")) for i in index]
    return _view("grpo", train.where, log, base.tokenizer, batch, (index, told, answers, values), config.group)


def proximal(config: Any, run_dir: str, log: Any, rows: int) -> View:
    """PPO: a completion of each of the first prompts, with a reward model's score and GAE's advantage of every token."""
    if not config.reward_model:
        raise UserError("PPO's rewards are a reward model's: give --config.reward_model=RUN, or --run of a run that trained one")
    prompts, places = ppo.prompts_of(config, log)
    with common.open_mesh(config) as mesh:
        base, judge = launch.load(config.init, default="sft", mesh=mesh), launch.load(config.reward_model, "reward", mesh=mesh)
        common.same_tokenizer(base, judge)
        now = trained(run_dir, base, log, mesh)
        columns = completions.prompt_columns(base.tokenizer, prompts, config.max_prompt, places)
        index = first_rows(columns, config, rows)
        scalars = partial(heads.scalars, heads.with_scalar_head(base.model))
        sample = completions.sampler(
            base.model, base.tokenizer, max_new_tokens=config.max_new_tokens, temperature=config.temperature
        )
        start, judged = base.params["policy"], judge.params["reward"]
        frozen = {
            "reward": judged,
            "scale": ppo.reward_scale(config, sample, start, scalars, judged, columns),
            "reference": start,
        }
        frozen["memory"] = policy.AdaptiveKL(jnp.float32(config.kl_coef))
        params = {"policy": now.params["policy"], "value": now.params.get("value", judged)}
        samples = *sample(params["policy"], common.take(columns, index), jax.random.key(config.seed), 0), {}
        scores = ppo.make_reward(config, scalars)(frozen, samples)
        batch, _ = jax.device_get(ppo.make_prepare(config, base.model, scalars, lambda p: p)(params, frozen, samples, scores))
    log.note(
        "reward: the reward model's score, standardised, less missing_eos_penalty; advantages by GAE, whitened over these rows"
    )
    told = [chat.as_messages(prompts[i], "user", places[i]) for i in index]
    where = config.data.path or "the instr world"
    return _view("ppo", where, log, base.tokenizer, batch, (index, told, [""] * len(index), np.asarray(scores)), 1)


def _view(experiment: str, where: str, log: Any, tokenizer: Any, batch: dict, found: tuple, size: int) -> View:
    """Rows of prompts, each with its completions."""
    index, told, answers, rewards = found
    shown = []
    for i, row in enumerate(index):
        at = range(i * size, (i + 1) * size)
        parts = [_completion(tokenizer, batch, k, float(rewards[k]), f"completion {k - at.start + 1}") for k in at]
        shown.append(Shown(f"prompt {row + 1}", [_as_told(part, tokenizer, told[i]) for part in parts], answers[i]))
    mask = np.asarray(batch["mask"])
    report = {"lengths": histogram(mask.sum(axis=1)), "of": "completions"}
    positions = int((batch["segments"] != 0).sum())
    return View(experiment, where, log.lines, shown, int(mask.sum()), positions, example_of(shown), report)


def _completion(tokenizer: Any, batch: dict, i: int, reward: float, name: str) -> Part:
    """A row of the update's batch with its reward and, token by token, its advantage."""
    advantages = np.broadcast_to(np.reshape(batch["advantages"][i], (-1,)), batch["mask"][i].shape)
    notes = [f"advantage {a:+.3g}, log-prob {p:.3g}" for a, p in zip(advantages, batch["logps_old"][i], strict=True)]
    mask = batch["mask"][i]
    row = {name: batch[name][i] for name in ("tokens", "targets", "segments", "mask")}
    if "weights" in batch:
        row["weights"] = batch["weights"][i]
    mean = float(advantages[mask].mean()) if mask.any() else 0.0
    said = "no reward: it failed" if np.isnan(reward) else f"reward {reward:.3g}"
    varied = mask.any() and float(np.ptp(advantages[mask])) > 1e-6
    facts = f"{said}, advantage {mean:+.3g}" + f" ({advantages[mask].min():+.2g} to {advantages[mask].max():+.2g})" * bool(varied)
    return sequence(tokenizer, row, name, [n if m else "" for n, m in zip(notes, mask, strict=True)], facts)


def _as_told(part: Part, tokenizer: Any, messages: Any) -> Part:
    """The part with the prompt's roles, and the assistant's behind it."""
    n = len(chat.encode_chat(tokenizer, messages, generation_prompt=True).tokens)
    head = with_roles([part._replace(tokens=part.tokens[:n])], tokenizer, [messages], 0, True)[0].tokens
    return part._replace(tokens=[*head, *(token._replace(role="assistant") for token in part.tokens[n:])])


ROLLOUTS: dict[str, Callable[[Any, str, Any, int], View]] = {"grpo": group, "ppo": proximal}
