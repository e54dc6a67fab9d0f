"""What a run logs, as data: each metric's formula, what is healthy, and what to do where it is not.

`low` and `high` bound a healthy value where one bound serves every model and every task: `diagnosis` reads them, and the tables
of docs/metrics.md are made of the rest by scripts/make_metrics.py. A part of a name in <> stands for any text.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple


class Metric(NamedTuple):
    """names: those that share a row; trl: its name in Hugging Face's TRL, "" where it has none; low, high: healthy bounds."""

    names: tuple[str, ...]
    formula: str
    healthy: str
    advice: str
    trl: str = ""
    low: float | None = None
    high: float | None = None


def _m(names: str, *said: str, low: float | None = None, high: float | None = None) -> Metric:
    return Metric(tuple(names.split()), *said, low=low, high=high)


SAME = "the same"
LENGTHEN = "raise `max_new_tokens`; or train longer in SFT, whose rows must end with the end token"
READ = "read samples; a verifier or a judge that is not the reward decides whether it is gamed"

EVERY = (
    _m("train/loss", "the stage's loss, see [stages.md](stages.md)", "falls; below", "rises: lower `optim.lr`; flat: raise it, "
       "and look at the data with experiments.inspect", SAME),
    _m("train/lr", "the schedule at this step", "as configured", "0: `optim.lr`, `optim.warmup` or `steps` is wrong",
       "`learning_rate`"),
    _m("train/grad_norm", "global norm of the gradient, before clipping to `optim.clip_norm`", "no growing trend",
       "growing: lower `optim.lr`, lengthen `optim.warmup`; single spikes: look at the rows of that step", SAME),
    _m("guard/skipped guard/nonfinite", "share of updates that were left out: all of them, and those that were not finite",
       "0, or rare", "look at the rows of these steps; lower `optim.lr`; lengthen `optim.warmup`", high=0.02),
    _m("data/truncated", "share of a file's examples that were cut because they are longer than `data.length`; in "
       "data_report.json", "0, or rare", "raise `data.length`, or shorten the rows: a cut answer has lost its end", high=0.05),
)  # fmt: skip
TIMES = (
    _m("time/data", "seconds since the previous line in which the host made batches and sent them to the devices",
       "small beside `time/step`", "pack the rows beforehand, or make the batch larger"),
    _m("time/eval time/save", "the same for evaluations and checkpoints, as far as the loop waits: Orbax writes in the "
       "background", "rare", "raise `eval_every`, `save_seconds`"),
    _m("time/first_step", "the call of a process's first step: tracing, compiling (or reading the compile cache); in that line "
       "only", "once", "a cache that is not kept: `JAX_COMPILATION_CACHE_DIR`"),
    _m("time/step", "all else, above all waiting for steps; the five add up to the time since the previous line", "most of it",
       "`config.profile` shows where it goes"),
    _m("perf/tokens_per_second", "positions of the batches, padding included (sampled ones at most, in online RL), a second of "
       "`time/data + time/step`", "steady", "falls: another process on the machine, or heat"),
    _m("perf/flops_per_second_per_device", "analytic FLOPs of a step over the same seconds and the devices of the mesh", "steady",
       "as above"),
    _m("perf/mfu", "that over the data sheet's dense bfloat16 peak; only where the chip is in `jaxllm/train/chips.py`",
       "[scale.md](scale.md) has ours", "larger batches, bfloat16, less remat"),
    _m("perf/programs_compiled", "programs that XLA compiled, or read from its cache, since the previous line",
       "0 once all parts have run", "shapes change from batch to batch: pad them"),
)  # fmt: skip
LANGUAGE = (
    _m("train/loss eval/loss", "`-sum m log p / sum m`, nats a token", "pretraining begins near ln(vocab)",
       "`eval/loss` rises while `train/loss` falls: overfitting, fewer steps or more data", "`loss`, `eval_loss`"),
    _m("train/mean_token_accuracy eval/mean_token_accuracy", "share of targets that are the most likely token", "rises",
       "1 at once: the model sees its targets", SAME),
)  # fmt: skip
FAMILIES = (
    _m("moe/load_balance_loss eval/moe/load_balance_loss", "`e sum_i f_i P_i`, mean over layers", "1 is balance",
       "raise `router.load_balance`", high=2.0),
    _m("moe/router_z_loss eval/moe/router_z_loss", "mean of `logsumexp(router logits)^2`", "does not grow", "raise `router.z`"),
    _m("moe/load_max moe/load_min eval/moe/load_max eval/moe/load_min",
       "load of the busiest and the idlest expert over an even share",
       "near 1; `load_min` 0 is a dead expert", "raise `router.load_balance` or `router.bias_rate`"),
    _m("moe/drops eval/moe/drops", "share of routed slots beyond an expert's capacity", "0 without a capacity",
       "raise the capacity, or balance the load", high=0.1),
    _m("moe/router_entropy eval/moe/router_entropy", "mean entropy of the routing distribution, nats",
       "below ln(experts), not near 0",
       "raise `router.z` and `router.load_balance`", low=0.01),
    _m("train/mtp_loss eval/mtp_loss", "cross-entropy of tokens further ahead, mean over depths", "above `loss`, falls",
       "lower `mtp`"),
    _m("train/mask_rate eval/mask_rate", "share of tokens chosen for masking", "`mask_rate`",
       "few tokens are eligible: look at the rows"),
    _m("train/mlm_loss eval/mlm_loss train/nsp_loss eval/nsp_loss train/nsp_accuracy eval/nsp_accuracy",
       "the two terms of BERT's loss", "`nsp_accuracy` leaves 0.5", "train longer; nsp needs long documents"),
    _m("eval/unigram_loss", "cross-entropy of masked tokens under token frequencies", "the loss falls below it", "train longer"),
    _m("exact_match/<task> eval/exact_match", "greedy answers that equal the target; their mean over tasks",
       "above the next two", "train longer"),
    _m("usual_target/<task> copied_input/<task>", "the same for the most frequent target, and for the input itself", "baselines",
       "-"),
    _m("train/forward train/backward eval/forward eval/backward", "the two directions of a bidirectional language model",
       "alike", "-"),
    _m("eval/bits_per_pixel", "`eval/loss / ln 2`", "falls below log2(colours)", "train longer"),
    _m("probe/best probe/best_layer probe/raw_pixels probe/untrained", "accuracy of linear probes, means over seeds",
       "best above both others", "train longer"),
    _m("train/accuracy eval/accuracy eval/accuracy_low eval/accuracy_high",
       "accuracy in training and held out, the latter with its 95 % bootstrap interval", "above the baselines",
       "more rows; a better trunk"),
    _m("eval/macro_f1", "mean over labels of F1", "near the accuracy when labels are balanced",
       "rare labels are missed: more of them"),
    _m("baseline/majority baseline/bag_of_words", "accuracy of the commonest label, of a bag of words", "-", "-"),
)  # fmt: skip
REWARD = (
    _m("train/loss eval/loss", "`-log sigmoid(r_w - r_l) + center (r_w + r_l)^2`", "begins at ln 2 = 0.693",
       "`eval/loss` rises: fewer steps, more pairs", SAME),
    _m("train/accuracy eval/accuracy", "pairs with `r_w > r_l`; a tie is one half", "0.5 at first; beats length alone",
       "stays at 0.5: the sides are swapped, alike or cut off; look with experiments.inspect", SAME),
    _m("train/margin eval/margin", "mean of `r_w - r_l`", "rises", "as above", SAME),
    _m("train/mean_reward eval/mean_reward", "mean of `(r_w + r_l) / 2`", "near 0: `center` holds it", "raise `center`", SAME),
)  # fmt: skip
DPO = (
    _m("train/loss", "`-log sigmoid(beta h) + nll_weight nll_loss`", "begins at `ln 2 + nll_weight nll_loss`",
       "stays there: raise `optim.lr`", SAME),
    _m("rewards/chosen", "`beta (log pi(y_w) - log ref(y_w))`", "0 at the start",
       "not 0 at step 1: the reference is not the model that training starts from", SAME),
    _m("rewards/rejected", "`beta (log pi(y_l) - log ref(y_l))`", "0 at the start, then falls", "as above", SAME),
    _m("rewards/margins", "`rewards/chosen - rewards/rejected`", "rises", "flat: raise `optim.lr` or lower `beta`", SAME),
    _m("rewards/accuracies", "share of pairs with a positive margin", "rises; the first step is noise",
       "stays at 0.5: sides swapped, alike or cut off", SAME),
    _m("logps/chosen logps/rejected", "`log pi(y_w)`, `log pi(y_l)`", "no steep fall of `logps/chosen`",
       "both fall together in DPO, which is normal; steeply: raise `nll_weight` or `beta`, fewer steps", SAME),
    _m("train/nll_loss", "mean over pairs of `-log pi(y_w) / tokens of y_w`", "stays low", "raise `nll_weight`",
       "`nll_loss`, a mean over tokens"),
    _m("pairs/identical pairs/empty", "shares of pairs with equal sides, and with a side without a token: both train nothing",
       "0", "remove these rows; raise `data.length`", high=0.05),
)  # fmt: skip
KTO = (
    _m("rewards/chosen rewards/rejected", "`beta log pi/ref` of good and of bad rows", "0 at the start, then apart",
       "not 0 at step 1: the reference is not the model that training starts from", SAME),
    _m("rewards/margins", "their difference", "rises", "flat: raise `optim.lr` or lower `beta`", SAME),
    _m("logps/chosen logps/rejected", "`log pi` of good and of bad rows", "no steep fall of `logps/chosen`",
       "raise `desirable_weight`", SAME),
    _m("train/kl", "the reference point z: mean `log pi/ref` of mismatched completions, at least 0", "0 at the start, small",
       "lower `optim.lr`, raise `beta`", "`kl`"),
    _m("rows/empty", "share of rows without a token", "0", "remove these rows; raise `data.length`", high=0.05),
)  # fmt: skip
ROLLOUT = (
    _m("objective/kl", "mean of `sum_t (log pi - log ref)_t`, nats an answer", "0 at the first step; small and stable",
       f"raise `kl_coef` or set `kl_target`, lower `optim.lr`; {READ}", SAME, high=50.0),
    _m("objective/entropy", "mean of `sum_t -log pi` of the sampled tokens", "falls slowly, no collapse",
       "raise `kl_coef`, lower `optim.lr`", SAME),
    _m("objective/scores", "mean score: standardised reward less `missing_eos_penalty`", "rises from 0 or a little below",
       "flat: raise `optim.lr` or lower `kl_coef`", SAME),
    _m("objective/non_score_reward", "`-kl_coef objective/kl`", "small beside the gain in score", "lower `kl_coef`", SAME),
    _m("objective/rlhf_reward", "scores + non_score_reward: what PPO maximises", "rises", "lower `optim.lr`", SAME),
    _m("val/num_eos_tokens", "share of answers that ended by themselves", "near 1", LENGTHEN, f"{SAME}, there a count", low=0.5),
    _m("completions/mean_length", "sampled tokens an answer, with the end token", "no drift to `max_new_tokens`",
       f"rises with the reward: {READ}", f"{SAME}, of GRPO"),
)  # fmt: skip
PPO = (
    _m("train/loss", "`loss/policy_avg + value_coef loss/value_avg`", "says little by itself", "look at the two terms"),
    _m("loss/policy_avg", "`-min(rho A, clip(rho, 1 +- clip) A)`", "near 0: advantages have mean 0",
       "lower `optim.lr`, `epochs`", SAME),
    _m("loss/value_avg", "half of the clipped squared error of the value", "falls", "lower `optim.lr`; raise `value_coef`", SAME),
    _m("policy/approxkl_avg", "mean of `(log pi - log pi_old)^2 / 2`", "small against 1", "lower `optim.lr`, `epochs`", SAME,
       high=0.2),
    _m("policy/clipfrac_avg", "share of tokens with `abs(rho - 1) > clip`", "small", "lower `optim.lr` or `epochs`", f"{SAME}*",
       high=0.3),
    _m("policy/entropy_avg", "mean entropy of the next-token distribution", "falls slowly", "raise `kl_coef`, lower `optim.lr`",
       SAME),
    _m("val/ratio", "mean of `rho`", "near 1", "lower `optim.lr`, `epochs`", SAME, low=0.8, high=1.25),
    _m("val/clipfrac_avg", "share of tokens whose value moved by more than `value_clip`", "small", "lower `optim.lr`",
       f"{SAME}*", high=0.5),
    _m("first/val/ratio", "`val/ratio` of the iteration's first update alone", "1 within 1e-4",
       "the samples are off-policy: sampler and trainer differ (temperature, top_p, dtype, stale weights)", low=0.99, high=1.01),
    _m("first/policy/approxkl_avg first/kl", "the same for `policy/approxkl_avg`, and, at the first step, for `train/kl`",
       "0 up to rounding", "as above"),
    _m("objective/kl_coef", "the KL penalty in use, with `kl_target`", "settles",
       "a target that is never met: lower `kl_target`"),
    _m("loss/ptx_avg", "cross-entropy of pretraining text, with `ptx_coef`", "does not rise", "raise `ptx_coef`"),
)  # fmt: skip
GRPO = (
    _m("train/loss", "the policy's term and the KL's", "near 0 where samples are on-policy: groups' advantages cancel",
       "nothing: look at `train/reward`"),
    _m("train/reward train/reward_std", "mean reward; mean s.d. within groups", "rises; above 0",
       "flat: a larger `group`, easier prompts, a higher `optim.lr`", SAME),
    _m("train/frac_reward_zero_std", "groups whose rewards are all equal, which train nothing", "well below 1",
       "prompts of mixed difficulty, a larger `group`, a higher `temperature`, or dynamic sampling (`groups`)", SAME, high=0.7),
    _m("rewards/<name>/mean rewards/<name>/std", "each reward by itself", "-", "-", SAME),
    _m("rewards/<name>/failures rewards/excluded", "rewards that raised, hung or gave no number; answers left out for it", "0",
       "the function's first failure is in log.txt; a failure is no reward of 0", high=0.0),
    _m("rewards/code/timeouts eval/rewards/code/timeouts", "programs that ran out of time (their reward is 0)",
       "small; at most 0.5",
       "ask for less in the tests, or raise the runner's seconds", high=0.5),
    _m("rewards/readable/mean", "with `numeric`: share of answers in which a number was found; the rest could not be right",
       "near 1", "ask for the format in the prompt, or reward it", low=0.5),
    _m("train/kl", "the KL estimate in the loss (k2 or k3), a token", "small; at most 1",
       "raise `kl_coef`, lower `optim.lr`", SAME),
    _m("objective/kl", "mean of `sum_t (log pi - log ref)_t`, nats an answer", "0 at the first step", "raise `kl_coef`",
       high=50.0),
    _m("train/entropy", "mean entropy of the next-token distribution", "no collapse",
       "raise `temperature` or the upper `clip`, lower `optim.lr`", SAME),
    _m("clip_ratio/low_mean clip_ratio/high_mean clip_ratio/region_mean",
       "tokens that clipping leaves without a gradient: rho below 1, above, either", "small", "lower `optim.lr`, `epochs`, "
       "`minibatches`", SAME, high=0.3),
    _m("policy/approxkl_avg val/ratio first/val/ratio first/policy/approxkl_avg", "as in PPO", "as in PPO", "as in PPO"),
    _m("completions/mean_length completions/min_length completions/max_length", "sampled tokens, the end token included",
       "no drift to `max_new_tokens`", f"rises with the reward: {READ}", SAME),
    _m("completions/clipped_ratio", "answers without an end token", "near 0", LENGTHEN, SAME, high=0.5),
    _m("completions/mean_terminated_length", "the mean length of the others", "-", "-", SAME),
    _m("completions/empty", "rows of an update without a trained token", "0", "rewards fail, or answers are all cut off",
       high=0.5),
    _m("sampling/importance_sampling_ratio/mean", "with `importance_cap`: trainer over sampler, truncated", "near 1",
       "sampler and trainer differ: the same dtype and temperature for both", SAME, low=0.9, high=1.1),
    _m("sampling/parts sampling/informative", "dynamic sampling: rollouts it took, share of groups that had a signal", "-",
       "prompts of mixed difficulty"),
    _m("eval/reward eval/rewards/<name>/mean eval/rewards/<name>/std", "greedy answers to held-out problems", "rises",
       "as `train/reward`"),
    _m("eval/rewards/<name>/failures eval/rewards/excluded", "as in training", "0", "as in training", high=0.0),
    _m("eval/mean_length eval/clipped_ratio", "the same answers' length, and those without an end token", "near 0",
       LENGTHEN),
)  # fmt: skip
ROUNDS = (
    _m("round/accuracy round/held_out_accuracy", "right among its samples; greedy answers to held-out problems", "rises",
       "more `samples`"),
    _m("round/coverage round/never_solved", "prompts with a right sample; prompts that no round has solved", "rises; falls",
       "more `samples`, a higher `temperature`"),
    _m("round/excluded round/rows", "samples without a reward; rows that the round trained on", "0; many", "see log.txt"),
    _m("round/mean_length round/mean_right_length", "tokens of the samples, and of the right ones", "no drift", "`select`"),
    _m("round/score round/pairs round/gold round/judge_agreement round/<other>",
       "the judge's score; pairs; the verifier's; pairs with unlike gold rewards that the judge orders rightly", "rise",
       "another judge"),
    _m("round/held_out/<name>", "of held-out prompts: `gold`, `kl` (to the start, nats an answer), `length`", "-", "-"),
    _m("proxy gold kl_bound", "best of n, with n for a step: by what chooses, by what judges, the KL at most", "rise",
       "gold falls: the proxy is gamed"),
)  # fmt: skip
SECTIONS = {
    "every": EVERY, "times": TIMES, "language": LANGUAGE, "families": FAMILIES, "reward": REWARD, "dpo": DPO, "kto": KTO,
    "rollout": ROLLOUT, "ppo": PPO, "grpo": GRPO, "rounds": ROUNDS,
}  # fmt: skip


# ---- looking up and writing down


@functools.cache
def _patterns() -> list[tuple[re.Pattern, Metric]]:
    rows = [m for section in SECTIONS.values() for m in section]
    pairs = [("".join(".+" if p[:1] == "<" else re.escape(p) for p in re.split(r"(<\w+>)", n)), m) for m in rows for n in m.names]
    # exact names go before those with a part that may be anything, a metric with bounds before the same name without
    pairs.sort(key=lambda pair: (".+" in pair[0], pair[1].low is None and pair[1].high is None))
    return [(re.compile(pattern), m) for pattern, m in pairs]


def find(name: str) -> Metric | None:
    """The metric of a logged name, None for one that is not in the table; bounds first where several stages share a name."""
    return next((metric for pattern, metric in _patterns() if pattern.fullmatch(name)), None)


def bounds_text(metric: Metric) -> str:
    """ "at least 0.5", "0.8 to 1.25", or nothing."""
    if metric.low is not None and metric.high is not None:
        return f"{metric.low:g} to {metric.high:g}"
    return f"at least {metric.low:g}" if metric.low is not None else "" if metric.high is None else f"at most {metric.high:g}"


def table(section: str) -> str:
    """A section as a table in Markdown."""
    lines = ["| name | formula | healthy | otherwise | TRL |", "|---|---|---|---|---|"]
    for m in SECTIONS[section]:
        healthy = "; ".join(filter(None, (m.healthy, bounds_text(m))))
        names = ", ".join(f"`{name}`" for name in m.names)
        lines.append(f"| {names} | {m.formula} | {healthy} | {m.advice} | {m.trl or '-'} |")
    return "\n".join(lines)
