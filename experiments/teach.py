"""Known bugs of real training code, to be switched on for teaching: `--config.teach_bug=mask_off_by_one`.

Each is one function, put in at one of the joints through which every experiment passes: `data` (columns, tokenizer) of
`common.fit`; `model` and `loss` where they are made; `sampler`, the options of `completions.sampler`; `step` of online RL;
`config`.
A run with one says so at its start and in result.json. `python -m experiments.doctor` finds every one (docs/doctor.md).
The issue numbers are public reports of the same bug in other code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import settings
from jaxllm.core.tree import map_paths
from jaxllm.core.types import Mean, UserError
from jaxllm.data import chat
from jaxllm.train.step import trained_roots


def records(columns: Any, change: Callable[[dict], dict]) -> Any:
    """Columns with every sequence record in them changed."""
    if not isinstance(columns, dict):
        return columns
    columns = {name: records(x, change) for name, x in columns.items()}
    return columns | change(columns) if {"tokens", "targets", "segments", "mask"} <= columns.keys() else columns


# ---- data


def mask_off_by_one(columns: Any, tokenizer: Any) -> Any:
    """The loss mask is shifted by one target: the first token of every answer is never trained, and what follows its end is.

    Samples begin with a wrong first token and are good after it. OpenRLHF#973, nanochat#20, trl#3279. Caught by `answers whole`.
    """
    return records(columns, lambda r: {"mask": np.pad(r["mask"][..., :-1], [(0, 0)] * (r["mask"].ndim - 1) + [(1, 0)])})


def pad_is_eos(columns: Any, tokenizer: Any) -> Any:
    """Padding is masked by its id, and the padding id is the end token's: the end is never trained.

    The loss is fine, and samples never stop. trl#976, trl#734, trl#1623, nanochat#810. Caught by `end trained`.
    """
    return records(columns, lambda r: {"mask": r["mask"] & ~np.isin(r["targets"], chat.stop_ids(tokenizer))})


def train_on_prompt(columns: Any, tokenizer: Any) -> Any:
    """Every token is trained, the user's too: the mask was lost on the way.

    The loss looks better than it is, and the model asks questions. nanochat#570 (0.315 instead of 0.355 of ChatCORE). Caught by
    `prompt untrained`.
    """
    return records(columns, lambda r: {"mask": r["segments"] != 0})


def unshifted_targets(columns: Any, tokenizer: Any) -> Any:
    """Targets are the tokens themselves, because nobody has shifted them: the model learns to copy what it reads.

    The loss falls to 0 within a few steps, and samples repeat one token. OpenRLHF#973 is the same off-by-one in a mask. Caught
    by `targets shifted`.
    """
    return records(columns, lambda r: {"targets": r["tokens"] * (r["segments"] != 0)})


def double_bos(columns: Any, tokenizer: Any) -> Any:
    """The template writes a start token and the tokenizer adds another; vocabularies without one get their end token in front.

    Nothing is seen in the loss; prompts at sampling time begin otherwise than in training. OpenRLHF#393, open-r1 PR#462. Caught
    by `one start token`.
    """
    start = tokenizer.specials.get("bos", tokenizer.specials["eos"])

    def change(r: dict) -> dict:
        front = np.full((*r["tokens"].shape[:-1], 2), start, r["tokens"].dtype)
        behind = {n: np.concatenate([r[n][..., :1]] * 2 + [r[n][..., :-2]], axis=-1) for n in ("segments", "mask")}
        tokens = np.concatenate([front, r["tokens"][..., :-2]], axis=-1)
        targets = np.concatenate([front[..., 1:], r["tokens"][..., :1], r["targets"][..., :-2]], axis=-1)
        return {"tokens": tokens, "targets": targets, **behind}

    return records(columns, change)


def empty_answers(columns: Any, tokenizer: Any) -> Any:
    """A third of the rows has no trained token, as when answers lie beyond the length: they are read, and train nothing.

    The loss is that of the other rows, and 0.0 at a step that has no other. trl#6668, nanochat#590, nanochat#618. Caught by
    `rows trained`.
    """
    kept = lambda mask: (np.arange(len(mask)) % 3 > 0).reshape(-1, *[1] * (mask.ndim - 1))  # noqa: E731
    return records(columns, lambda r: {"mask": r["mask"] & kept(r["mask"])})


def wrong_reference(columns: Any, tokenizer: Any) -> Any:
    """The reference's log-probabilities are of another checkpoint (an adapter left in, a later step).

    KL and rewards do not start at 0, and the policy is pulled to where it never was. trl#1340, trl#495. Caught by
    `start at the reference`, and by the gate of the run itself.
    """
    return {name: x + np.float32(3) if name.startswith("ref_") else x for name, x in columns.items()}


# ---- the model


def positions_not_reset(model: Any) -> Any:
    """Positions run on over the examples that are packed into a row.

    The second example of a row is read as if it began late; with learned positions late ones are overtrained, with rotary ones
    nothing changes. nanochat PR#582, trl#1230. Caught by `packed = separate`.
    """

    def apply(params: Any, tokens: Any, *, positions: Any = None, cache: Any = None, **options: Any) -> Any:
        if positions is None and cache is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return model.apply(params, tokens, positions=positions, cache=cache, **options)

    return model._replace(apply=apply)


def left_pad_positions(model: Any) -> Any:
    """Positions are counted from the row's first slot, its padding too, as where rows are padded on the left.

    A row's log-probabilities depend on how long its neighbours are; rotary positions do not notice. trl#6800, trl#469,
    EasyDeL#61. Caught by `padding`.
    """

    def apply(params: Any, tokens: Any, *, positions: Any = None, segments: Any = None, cache: Any = None, **options: Any) -> Any:
        if positions is None and cache is None and segments is not None:
            positions = jnp.arange(tokens.shape[1])[None, :] + jnp.sum(segments == 0, axis=1, keepdims=True)
        return model.apply(params, tokens, positions=positions, segments=segments, cache=cache, **options)

    return model._replace(apply=apply)


def cache_off_by_one(model: Any) -> Any:
    """Tokens that are decoded one by one get the position after their own.

    Samples are a little worse than the loss promises, and RL's ratio is not 1. trl#3867, verl#2088. Caught by `cache = full`.
    """

    def apply(params: Any, tokens: Any, *, positions: Any = None, cache: Any = None, **options: Any) -> Any:
        if positions is None and cache is not None and hasattr(cache, "length"):
            late = jnp.where(cache.length > 0, cache.length + 1, cache.length)
            positions = late[:, None] + jnp.arange(tokens.shape[1])[None, :]
        return model.apply(params, tokens, positions=positions, cache=cache, **options)

    return model._replace(apply=apply)


# ---- the loss


def packing_leak(loss: Any) -> Any:
    """The segments of a packed row are forgotten: an example attends to those before it.

    The loss is a little lower, and answers borrow from strangers. trl#1230, trl#805, trl#3067, alignment-handbook#204. Caught by
    `packed = separate`.
    """
    forget = lambda r: {"segments": (r["segments"] != 0).astype(jnp.int32)}  # noqa: E731
    return lambda params, batch, rng: loss(params, records(batch, forget), rng)


def reward_on_pad(loss: Any) -> Any:
    """The reward is read at the last slot of the row, which in all rows but the longest is padding.

    A reward model's accuracy depends on the batch, and length decides. trl#3750, trl#1893, trl PR#5338. Caught by `padding`.
    """
    whole = lambda r: {"segments": jnp.ones_like(r["segments"])}  # noqa: E731
    return lambda params, batch, rng: loss(params, records(batch, whole), rng)


def mean_of_means(loss: Any) -> Any:
    """Each micro-batch is divided by its own number of tokens, and the means are averaged.

    A token of a short micro-batch counts for more; the loss changes with config.accumulate. trl#2175, trl PR#6024,
    torchtune#2037, transformers#34191. Caught by `accumulation`.
    """

    def averaged(params: Any, batch: Any, rng: Any) -> Any:
        mean, metrics = loss(params, batch, rng)
        return Mean(mean.value(), jnp.float32(1)), metrics

    return averaged


def frozen_by_mistake(loss: Any) -> Any:
    """A stopped gradient (a detach, a wrong pattern) keeps the attention layers as they were.

    The curves look healthy: the rest learns. trl#6700 (100 steps of GRPO, weights byte-identical). Caught by `gradients`.
    """

    def stopped(params: Any, batch: Any, rng: Any) -> Any:
        held = lambda path, x: jax.lax.stop_gradient(x) if "attention/" in path else x  # noqa: E731
        return loss(map_paths(held, params), batch, rng)

    return stopped


# ---- the sampler, the step, the config


def missing_temperature(options: dict) -> dict:
    """The sampler's temperature is not the one that the loss divides its logits by.

    The ratio of the first update is not 1 (2.0 on the first token, as reported), and clipping eats the gradient. trl#4159, trl
    PR#3867. Caught by `sampler = trainer`, and by the gate of PPO and GRPO.
    """
    return options | {"temperature": 0.7 * options["temperature"]}


def reference_follows_policy(step: Any, frozen: Any) -> Any:
    """The reference is a second name of the policy: KL stays 0 whatever the policy does, and holds nothing back.

    The curve of the KL is a line at 0, which looks like a well-behaved run. trl#1340, trl PR#3196. Caught by `KL holds`.
    """

    if "reference" not in frozen:
        raise UserError("config.teach_bug=reference_follows_policy needs a reference that is read live: use it with ppo or grpo")

    def following(state: Any, frozen: Any, batch: Any, rng: Any) -> Any:
        now = jax.tree.map(jnp.copy, trained_roots(state.params, frozen)["policy"])  # the step donates the policy's
        return step(state, {**frozen, "reference": now}, batch, rng)

    return following


def kl_sign(config: Any) -> Any:
    """The KL's coefficient has the wrong sign: the policy is paid for leaving its reference.

    KL explodes, and the text becomes noise. OpenRLHF#768 asks where, and how often, the KL is counted. Caught by `KL holds`.
    """
    if "kl_coef" not in config or config.get("kl") == "none":
        raise UserError("config.teach_bug=kl_sign needs a KL: use it with ppo or grpo")
    return {"kl_coef": -config.kl_coef}


class Bug(NamedTuple):
    """Where a bug is put in, and the function of what is there."""

    joint: str
    change: Callable[..., Any]


JOINTS = {
    "data": (mask_off_by_one, pad_is_eos, train_on_prompt, unshifted_targets, double_bos, empty_answers, wrong_reference),
    "model": (positions_not_reset, left_pad_positions, cache_off_by_one),
    "loss": (packing_leak, reward_on_pad, mean_of_means, frozen_by_mistake),
    "sampler": (missing_temperature,), "step": (reference_follows_policy,), "config": (kl_sign,),
}  # fmt: skip
BUGS = {change.__name__: Bug(joint, change) for joint, changes in JOINTS.items() for change in changes}
_bug: ContextVar[tuple[Bug, set[str]] | None] = ContextVar("bug", default=None)  # and the joints that were passed


def of(config: Any) -> Bug | None:
    """The bug that a config asks for. UserError on an unknown name, with the nearest."""
    name = config.get("teach_bug", "")
    if name and name not in BUGS:
        near = settings.nearest(name, BUGS)
        raise UserError(f"config.teach_bug={name!r}: {f'did you mean {near!r}? ' if near else ''}There are {', '.join(BUGS)}")
    return BUGS[name] if name else None


@contextlib.contextmanager
def taught(config: Any) -> Iterator[None]:
    """A block in which the config's bug is in."""
    bug = of(config)
    changes = bug.change(config) if bug and bug.joint == "config" else {}
    before = {name: config[name] for name in changes}
    token = _bug.set(bug and (bug, {"config"}))
    config.update(changes)
    try:
        yield
    finally:
        config.update(before)
        _bug.reset(token)


def at(joint: str, value: Any, *given: Any) -> Any:
    """What stands at a joint: `value`, or what the bug makes of it. Unchanged ones are given back as they are."""
    bug, passed = _bug.get() or (None, set())
    passed.add(joint)
    return value if bug is None or bug.joint != joint else bug.change(value, *given)


def announce(config: Any, run: Any, before: Any, after: Any) -> None:
    """The banner of a run with a bug, once its columns are known. UserError where the bug finds nothing to break."""
    bug, passed = _bug.get() or (None, set())
    if bug is None:
        return
    idle = bug.joint == "data" and all(jax.tree.leaves(jax.tree.map(np.array_equal, before, after)))
    if idle or bug.joint not in passed:
        raise UserError(f"config.teach_bug={config.teach_bug} finds nothing to break in this experiment: see docs/doctor.md")
    said = bug.change.__doc__.split("\n")[0]
    run.warn(f"THIS RUN HAS A BUG, put in for teaching: config.teach_bug={config.teach_bug}. {said} Keep nothing that it trains.")
