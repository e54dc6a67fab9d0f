"""Rules of the diagnosis that compare a metric with its own past, or with another metric: history -> Verdict or None.

A rule that needs a trend is silent below TREND logged values: a short run is no evidence.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

TREND = 10  # logged values that a trend needs
Line = tuple[Sequence[float], Sequence[float]]
History = Mapping[str, Line]  # metric -> (steps, values); nan where a value was not finite


class Verdict(NamedTuple):
    """name: the rule's or the metric's; step: from when on; normal: it looks wrong and is not, no reason to act."""

    name: str
    step: int
    what: str
    advice: str
    normal: bool = False


Rule = Callable[[History], Verdict | None]


# ---- arithmetic on a line


def finite(history: History, *names: str) -> tuple[str, list[float], list[float]]:
    """(name, steps, values) of the first of `names` that was logged, without what is not finite."""
    name = next((n for n in names if n in history), "")
    pairs = [(s, v) for s, v in zip(*history.get(name, ((), ())), strict=True) if math.isfinite(v)]
    return name, [s for s, _ in pairs], [v for _, v in pairs]


def first_and_last(values: Sequence[float]) -> tuple[float, float] | None:
    """Means of the first and of the last fifth; None for fewer than TREND values."""
    if len(values) < TREND:
        return None
    part = max(2, len(values) // 5)
    return statistics.fmean(values[:part]), statistics.fmean(values[-part:])


def since(steps: Sequence[float], values: Sequence[float], bad: Callable[[float], bool]) -> int:
    """The first step of the last unbroken stretch of bad means over three neighbours."""
    smooth = [statistics.fmean(values[max(0, i - 1) : i + 2]) for i in range(len(values))]
    last = len(smooth)
    while last > 0 and bad(smooth[last - 1]):
        last -= 1
    return int(steps[min(last, len(steps) - 1)])


def shown(value: float) -> str:
    return f"{value:.3g}"


# ---- every stage


def not_finite(history: History) -> Verdict | None:
    """A logged value that is not a number."""
    for name, (steps, values) in history.items():
        if bad := [s for s, v in zip(steps, values, strict=True) if not math.isfinite(v)]:
            what = f"{name} was not finite at step {int(bad[0])} ({len(bad)} times)"
            advice = "lower optim.lr, lengthen optim.warmup, look at the rows of that step"
            return Verdict("not finite", int(bad[0]), what, advice)
    return None


def rate_zero(history: History) -> Verdict | None:
    """A learning rate of 0 in at least half of the lines."""
    _, steps, values = finite(history, "train/lr")
    zero = [s for s, v in zip(steps, values, strict=True) if v == 0]
    if len(zero) < 2 or 2 * len(zero) < len(values):
        return None
    what = f"the learning rate was 0 at {len(zero)} of {len(values)} logged steps, from step {int(zero[0])}"
    return Verdict("learning rate 0", int(zero[0]), what, "check optim.lr, optim.warmup and optim.final against steps")


def _supervised(history: History) -> tuple[list[float], list[float]]:
    """The line of train/loss where the loss is a score: not of online RL."""
    if {"train/reward", "objective/scores"} & set(history):
        return [], []
    return finite(history, "train/loss")[1:]


def loss_flat(history: History) -> Verdict | None:
    """A loss that ends within 1 % of where it began."""
    steps, values = _supervised(history)
    if (ends := first_and_last(values)) is None or abs(ends[0] - ends[1]) > 0.01 * abs(ends[0]) or abs(ends[0]) < 0.05:
        return None
    what = f"train/loss did not move: {shown(ends[0])} at first, {shown(ends[1])} at the end"
    return Verdict("loss flat", int(steps[0]), what, "raise optim.lr; see with experiments.inspect what is trained")


def loss_diverging(history: History) -> Verdict | None:
    """A loss that ends clearly above its best: by a third of what it had fallen, and a tenth of its start."""
    steps, values = _supervised(history)
    if (ends := first_and_last(values)) is None:
        return None
    means = [statistics.fmean(values[max(0, i - 2) : i + 3]) for i in range(len(values))]
    at = min(range(len(means)), key=means.__getitem__)
    rise, fall = ends[1] - means[at], max(0.0, ends[0] - means[at])
    if rise < max(0.33 * fall, 0.1 * abs(ends[0])) or at > len(values) - TREND // 2:
        return None
    what = f"train/loss rose from {shown(means[at])} at step {int(steps[at])} to {shown(ends[1])}"
    return Verdict("loss diverging", int(steps[at]), what, "lower optim.lr, lengthen optim.warmup, keep optim.clip_norm")


def _spike(steps: Sequence[float], values: Sequence[float], times: float, window: int = 20) -> tuple[int, float, float] | None:
    """(step, value, what was usual) of the largest value over `times` the median of the window before it."""
    best = None
    for i in range(TREND, len(values)):
        before = sorted(values[max(0, i - window) : i])
        usual, spread = statistics.median(before), before[-1] - before[0]
        if values[i] > times * usual > 0 and values[i] > before[-1] + 2 * spread and (best is None or values[i] > best[1]):
            best = int(steps[i]), values[i], usual
    return best


def loss_spike(history: History) -> Verdict | None:
    """A single loss of half more than usual."""
    if (found := _spike(*_supervised(history), times=1.5)) is None:
        return None
    step, value, usual = found
    what = f"train/loss spiked to {shown(value)} at step {step} (about {shown(usual)} before)"
    return Verdict("loss spike", step, what, "look at the rows of that step; lower optim.lr or optim.b2 when there are several")


def grad_spike(history: History) -> Verdict | None:
    """A gradient norm of ten times what is usual."""
    if (found := _spike(*finite(history, "train/grad_norm")[1:], times=10.0)) is None:
        return None
    step, value, usual = found
    what = f"train/grad_norm jumped to {shown(value)} at step {step} (about {shown(usual)} before)"
    return Verdict("gradient spike", step, what, "look at the rows of that step; keep optim.clip_norm, lower optim.lr")


def loss_zero(history: History) -> Verdict | None:
    """Next-token prediction that costs nothing: the targets are in the inputs, or the data are learnt by heart."""
    name, steps, values = finite(history, "train/mean_token_accuracy")
    ends = first_and_last(values)
    if ends is None or ends[1] < 0.995:
        return None
    what = f"{name} is {shown(ends[1])}: every target is predicted"
    step = since(steps, values, lambda v: v >= 0.995)
    advice = "does the model see its targets? If not, the data are learnt by heart: more of them"
    return Verdict("loss near 0", step, what, advice)


def overfitting(history: History) -> Verdict | None:
    """Held-out loss above its best while the training loss is not."""
    _, steps, values = finite(history, "eval/loss")
    _, own_steps, own = finite(history, "train/loss")
    if len(values) < 3 or not own:
        return None
    at = min(range(len(values)), key=values.__getitem__)
    then = statistics.fmean([v for s, v in zip(own_steps, own, strict=True) if s <= steps[at]][-3:] or own[:1])
    if values[-1] < values[at] + 0.03 * abs(values[at]) or statistics.fmean(own[-3:]) > then:
        return None
    what = f"eval/loss rose from {shown(values[at])} at step {int(steps[at])} to {shown(values[-1])} while train/loss fell"
    return Verdict("overfitting", int(steps[at]), what, f"stop near step {int(steps[at])}, or use more data")


def eval_gap(history: History) -> Verdict | None:
    """Held-out loss far above the training loss at the end."""
    if overfitting(history) is not None:
        return None
    _, steps, values = finite(history, "eval/loss")
    if not values or (ends := first_and_last(_supervised(history)[1])) is None or values[-1] < 1.5 * ends[1] + 0.1:
        return None
    what = f"eval/loss {shown(values[-1])} is far above train/loss {shown(ends[1])} at step {int(steps[-1])}"
    advice = "the model knows its training rows: more data, fewer steps; or other data are held out"
    return Verdict("eval gap", int(steps[-1]), what, advice)


def waiting(history: History) -> Verdict | None:
    """A loop that waits for data in more than a third of its time."""
    _, steps, data = finite(history, "time/data")
    _, _, busy = finite(history, "time/step")
    if len(data) < TREND or sum(data) < 0.33 * (sum(data) + sum(busy)) or sum(data) + sum(busy) <= 0:
        return None
    share = sum(data) / (sum(data) + sum(busy))
    return Verdict(
        "data wait",
        int(steps[0]),
        f"{share:.0%} of the time went into making batches",
        "pack rows beforehand; larger models hide it",
    )


# ---- preferences


def off_reference(history: History) -> Verdict | None:
    """KL, or rewards against the reference, that are not 0 at step 1, or a first ratio that is not 1."""
    rl = ("objective/kl", "first/kl", "rewards/chosen", "rewards/rejected")
    for name in rl if "rewards/chosen" in history or "objective/kl" in history else ():
        _, steps, values = finite(history, name)
        if steps and steps[0] == 1 and abs(values[0]) > 0.05:
            what = f"{name} is {shown(values[0])} at step 1, where policy and reference are the same"
            advice = "the reference is another model, or log-probs differ: dtype, masks, temperature"
            return Verdict("start off the reference", 1, what, advice)
    return None


def accuracy_stuck(history: History) -> Verdict | None:
    """Pairs that are told apart no better than by a coin."""
    margin = {"train/margin": "train/accuracy", "rewards/margins": "rewards/accuracies"}
    name, steps, values = finite(history, *(acc for m, acc in margin.items() if m in history))
    ends = first_and_last(values)
    if ends is None or abs(ends[1] - 0.5) > 0.04 or abs(ends[0] - 0.5) > 0.15:
        return None
    advice = "are the sides swapped, alike or cut off? See experiments.inspect; else raise optim.lr, train longer"
    return Verdict("accuracy stuck", int(steps[0]), f"{name} stays at {shown(ends[1])}, a coin's", advice)


def chosen_falls(history: History) -> Verdict | None:
    """The log-probability of chosen answers falling: with the rejected ones it is normal, if not by half."""
    _, steps, chosen = finite(history, "logps/chosen")
    _, _, rejected = finite(history, "logps/rejected")
    ends, others = first_and_last(chosen), first_and_last(rejected)
    if ends is None or others is None or ends[1] > ends[0] - 0.2 * abs(ends[0]):
        return None
    step = since(steps, chosen, lambda v: v < ends[0] - 0.2 * abs(ends[0]))
    fell = f"logps/chosen fell from {shown(ends[0])} to {shown(ends[1])}"
    what = f"{fell}, logps/rejected from {shown(others[0])} to {shown(others[1])}"
    if others[1] < others[0] and ends[1] > ends[0] - 0.5 * abs(ends[0]):
        return Verdict("chosen falls", step, what, "in DPO both fall, as long as the margin grows", normal=True)
    advice = "raise nll_weight or beta, fewer steps; if only chosen falls, the sides are swapped"
    return Verdict("chosen falls", step, what, advice)


# ---- online reinforcement learning


def entropy_collapse(history: History) -> Verdict | None:
    """Entropy that fell to a tenth of its start."""
    name, steps, values = finite(history, "train/entropy", "policy/entropy_avg", "objective/entropy")
    ends = first_and_last(values)
    if ends is None or ends[0] <= 1e-3 or ends[1] > 0.1 * ends[0]:
        return None
    step = since(steps, values, lambda v: v <= 0.1 * ends[0])
    what = f"entropy collapsed at step {step}: {name} from {shown(ends[0])} to {shown(ends[1])}"
    advice = "samples of a group no longer differ: raise temperature, kl_coef or the upper clip, lower optim.lr"
    return Verdict("entropy collapse", step, what, advice)


def kl_high(history: History) -> Verdict | None:
    """A KL in the loss above 1 nat a token."""
    if "train/reward" not in history:
        return None  # KTO's train/kl is a sum over a completion
    _, steps, values = finite(history, "train/kl")
    ends = first_and_last(values)
    if ends is None or ends[1] <= 1:
        return None
    step = since(steps, values, lambda v: v > 1)
    return Verdict(
        "train/kl",
        step,
        f"train/kl {shown(ends[1])} nats a token is above 1 since step {step}",
        "raise kl_coef, lower optim.lr; read samples",
    )


def _reward(history: History) -> tuple[str, list[float], list[float]]:
    return finite(history, "train/reward", "objective/scores")


def _rise(values: Sequence[float]) -> float | None:
    """How far a line rose, in standard deviations of its steps' differences; None below TREND values."""
    if (ends := first_and_last(values)) is None:
        return None
    noise = statistics.pstdev([b - a for a, b in zip(values, values[1:], strict=False)]) / math.sqrt(2)
    return (ends[1] - ends[0]) / max(noise, 1e-9)


def reward_flat(history: History) -> Verdict | None:
    """A reward that, after twenty logged steps, is not above its start by more than its noise."""
    name, steps, values = _reward(history)
    rise = _rise(values)
    if rise is None or len(values) < 2 * TREND or rise > 0.5:
        return None
    ends = first_and_last(values)
    what = f"{name} did not rise: {shown(ends[0])} at first, {shown(ends[1])} at the end"
    advice = "easier prompts, a larger group, a higher optim.lr; is the answer ever right?"
    return Verdict("reward flat", int(steps[0]), what, advice)


def length_gamed(history: History) -> Verdict | None:
    """A reward that rises while answers become twice as long."""
    _, steps, lengths = finite(history, "completions/mean_length")
    name, _, rewards = _reward(history)
    ends, rise = first_and_last(lengths), _rise(rewards)
    if ends is None or rise is None or rise < 1 or ends[1] < 2 * ends[0]:
        return None
    step = since(steps, lengths, lambda v: v > 1.5 * ends[0])
    what = f"{name} rises while completions/mean_length went from {shown(ends[0])} to {shown(ends[1])} tokens"
    advice = "longer may only be liked, not better: read samples, normalise by constant, penalise length"
    return Verdict("length", step, what, advice)


def unreadable(history: History) -> Verdict | None:
    """Answers that a verifier could not read: wrong and unreadable are two failures with two cures."""
    _, steps, read = finite(history, "rewards/readable/mean")
    _, _, right = finite(history, "rewards/numeric/mean")
    ends = first_and_last(read)
    if ends is None or ends[1] >= 0.5:
        return None
    known = f", {shown(first_and_last(right)[1])} are right" if first_and_last(right) else ""
    what = f"in {1 - ends[1]:.0%} of the answers no number was found{known}"
    advice = "teach the format in SFT or by a format reward before the answer's reward can work"
    return Verdict("rewards/readable/mean", int(steps[0]), what, advice)


def sampler_differs(history: History) -> Verdict | None:
    """Samples that the trainer does not find as likely as the sampler did."""
    _, steps, values = finite(history, "first/policy/approxkl_avg")
    bad = [s for s, v in zip(steps, values, strict=True) if v > 1e-2]
    if not bad:
        return None
    what = f"first/policy/approxkl_avg is up to {shown(max(values))}, from step {int(bad[0])}: sampler and trainer differ"
    advice = "the same temperature, top_p, dtype and weights for both; importance_cap corrects small gaps"
    return Verdict("sampler mismatch", int(bad[0]), what, advice)


def value_diverges(history: History) -> Verdict | None:
    """A value function whose error doubles."""
    _, steps, values = finite(history, "loss/value_avg")
    ends = first_and_last(values)
    if ends is None or ends[1] < 2 * ends[0] or ends[1] < 0.1:
        return None
    what = f"loss/value_avg grew from {shown(ends[0])} to {shown(ends[1])}"
    return Verdict("value diverging", since(steps, values, lambda v: v > 2 * ends[0]), what, "lower optim.lr, raise value_coef")


def loss_near_zero_is_normal(history: History) -> Verdict | None:
    """GRPO's logged loss, whose gradient is not 0: the advantages of a group cancel while samples are on-policy."""
    _, steps, values = finite(history, "train/loss")
    _, _, norm = finite(history, "train/grad_norm")
    ends = first_and_last(values)
    if "train/reward" not in history or ends is None or abs(ends[1]) > 0.02 or not norm or max(norm) <= 0:
        return None
    what = f"train/loss stays near {ends[1]:.1e}"
    advice = "advantages cancel where samples are on-policy, and the gradient does not; train/reward says whether it learns"
    return Verdict("loss near 0 in GRPO", int(steps[0]), what, advice, normal=True)


def dead_expert(history: History) -> Verdict | None:
    """An expert that no token takes."""
    _, steps, values = finite(history, "moe/load_min")
    ends = first_and_last(values)
    if ends is None or ends[1] > 0.05:
        return None
    step = since(steps, values, lambda v: v <= 0.05)
    return Verdict(
        "dead expert",
        step,
        f"moe/load_min is {shown(ends[1])} since step {step}",
        "raise router.load_balance or router.bias_rate",
    )


RULES: tuple[Rule, ...] = (
    not_finite, rate_zero, loss_flat, loss_diverging, loss_spike, grad_spike, loss_zero, overfitting, eval_gap, waiting,
    off_reference, accuracy_stuck, chosen_falls, entropy_collapse, kl_high, reward_flat, length_gamed, unreadable,
    sampler_differs, value_diverges, loss_near_zero_is_normal, dead_expert,
)  # fmt: skip
