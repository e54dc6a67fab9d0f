"""What a reward model learns from noisy comparisons: how many, from which start, in pairs or in rankings.

python -m experiments.studies.reward_model    (minutes on two cores; --config=configs/studies/reward_model.py:full elsewhere)
Gold is the world's known reward; annotators are simulated: Bradley-Terry on the gap in gold, so about a fifth of labels is wrong.
"""

from __future__ import annotations

from functools import partial

import jax
import numpy as np

from experiments.studies import lab
from experiments.studies.lab.showing import banded, failed, less, more
from experiments.studies.reward_model.arms import STARTS, by_pairs, by_rankings, chosen, prepare
from jaxllm import launch
from jaxllm.evals import reward_checks, stats
from jaxllm.report import figures
from jaxllm.report.run import at_least


def measure(c, curves, ranked, ceiling):
    """{name: a value for each seed} of everything that is claimed."""
    accuracy, rank, margin = (chosen(curves, name) for name in ("accuracy", "spearman", "margin"))
    m = {"ceiling": ceiling}
    for i, n in enumerate(c.pairs):
        for j, start in enumerate(STARTS):
            m[f"{start}, {n} pairs/accuracy"] = accuracy[i, j]
            m[f"{start}, {n} pairs/spearman"] = rank[i, j]
            ece = [reward_checks.calibration_error(x) for x in margin[i, j]]
            m[f"{start}, {n} pairs/calibration_error"] = np.array(ece)
            last = [reward_checks.calibration_error(x) for x in curves["margin"][i, j, :, -1]]
            m[f"{start}, {n} pairs/calibration_error_at_the_end"] = np.array(last)
    most = accuracy[-1].mean(axis=-1).argmax()  # the better start with all pairs
    m["above_ceiling"] = accuracy[-1, most] - ceiling
    growth = [np.polyfit(np.log10(c.pairs), a, 1)[0] for a in accuracy.mean(axis=1).T]
    m["gain_per_tenfold"] = np.array(growth)
    for name, x in ranked.items():
        m[f"{name}/accuracy"] = chosen(x, "accuracy")
        m[f"{name}/loss_at_the_end"] = x["loss"][:, -1]
        m[f"{name}/overfit"] = x["loss"][:, -1] - x["train_loss"][:, -1]
    whole, single = ranked["rankings"], ranked["pairs"]
    early = [np.interp(whole["step"][0, -1], at, loss) for at, loss in zip(single["step"], single["loss"], strict=True)]
    m["pairs/loss_at_equal_steps"] = np.array(early)
    return m


def claims_of(c, m):
    """The claims: gates in the least seed, for every seed must agree; findings as means over seeds with their intervals."""
    few, many = c.pairs[0], c.pairs[-1]
    best = max(STARTS, key=lambda s: m[f"{s}, {many} pairs/spearman"].mean())

    def each(text, x, kind="finding"):
        if kind == "gate":
            return at_least(f"{text}, least seed", x.min(), 0.0)
        found = stats.mean_interval(x)
        return at_least(text, found.mean, 0.0, kind=kind, low=found.low, high=found.high)

    lm = m[f"{STARTS[1]}, {few} pairs/accuracy"] - m[f"{STARTS[0]}, {few} pairs/accuracy"]
    early = m["pairs/loss_at_equal_steps"] - m["rankings/loss_at_the_end"]
    loss, overfit = (m[f"pairs/{name}"] - m[f"rankings/{name}"] for name in ("loss_at_the_end", "overfit"))
    return [
        each(f"accuracy of the better start above what the noisy labels allow, {many} pairs", m["above_ceiling"], "gate"),
        each("accuracy gained per tenfold pairs", m["gain_per_tenfold"], "gate"),
        more(f"rank correlation with gold, {many} pairs", m[f"{best}, {many} pairs/spearman"], 0.9),
        less(f"calibration error, {many} pairs", m[f"{best}, {many} pairs/calibration_error"], 0.05),
        each(f"accuracy that the language model's weights add, {few} pairs", lm),
        each("gap from training to held-out loss that whole rankings save, equal passes", overfit),
        each("held-out loss that whole rankings save, equal passes", loss),
        each("held-out loss that whole rankings save, equal steps", early),
        each("accuracy that whole rankings add, each at its best step", m["rankings/accuracy"] - m["pairs/accuracy"]),
    ]


def findings_of(c, m, claims):
    """The paragraph: numbers first, then what did not come out."""
    at = lambda name: f"{m[name].mean():.3f}"  # noqa: E731
    line = lambda start, name: ", ".join(at(f"{start}, {n} pairs/{name}") for n in c.pairs)  # noqa: E731
    scratch, lm = STARTS
    end, many = "calibration_error_at_the_end", ", ".join(map(str, c.pairs))
    # said only where it was seen
    behind = m[f"{lm}, {c.pairs[0]} pairs/accuracy"].mean() < m[f"{scratch}, {c.pairs[0]} pairs/accuracy"].mean()
    slower = m["rankings/loss_at_the_end"].mean() > m["pairs/loss_at_the_end"].mean()
    why = (
        " That these weights do not help is likely the world's doing: to predict a Markov chain only the last word is needed, "
        "while the reward counts words over the whole string, as the even attention of fresh weights does."
    )
    learned = " The rankings' smaller gap comes with a higher loss: in fewer steps they have learned less, not better."
    return (
        f"Simulated annotators agree with gold {at('ceiling')} of the time. With {many} of their pairs a reward model from "
        f"scratch orders fresh pairs as gold does {line(scratch, 'accuracy')} of the time, one from the language model's weights "
        f"{line(lm, 'accuracy')} (at the step that validation labels choose; {c.seeds} seeds).{why if behind else ''} Rank "
        f"correlations with gold: {line(scratch, 'spearman')}, and {line(lm, 'spearman')}. Calibration errors at the last step: "
        f"{line(scratch, end)}, and {line(lm, end)}. {c.rankings} rankings of {c.k}, read {c.passes} times as wholes or as "
        f"independent pairs with as many completions a step, end at held-out losses of {at('rankings/loss_at_the_end')} and "
        f"{at('pairs/loss_at_the_end')}, {at('rankings/overfit')} and {at('pairs/overfit')} above training, with accuracies of "
        f"{at('rankings/accuracy')} and {at('pairs/accuracy')} at their best steps.{learned if slower else ''} The pairs take "
        f"{c.k - 1} times the steps; at as many as the rankings take their loss is {at('pairs/loss_at_equal_steps')}. "
        f"Did not come out: {failed(claims)}."
    )


def draw(c, run, m, curves, ranked):
    """Accuracy against pairs, calibration, and the two ways to read rankings."""
    x = np.log10(c.pairs)
    lines, bands = banded(x, {s: np.stack([m[f"{s}, {n} pairs/accuracy"] for n in c.pairs], axis=1) for s in STARTS})
    lines["best that the labels allow"] = (x, np.full(len(x), m["ceiling"].mean()))
    title = "Agreement with gold on fresh pairs"
    run.figure("pairs", figures.line_plot(lines, title, "log10 of training pairs", "accuracy", bands=bands))
    bins = reward_checks.calibration(chosen(curves, "margin")[-1, 0].reshape(-1))
    run.figure("calibration", figures.calibration_plot(*bins, title=f"{c.pairs[-1]} pairs, fresh labels"))
    loss = {n: (np.linspace(0, c.passes, r["loss"].shape[1]), r["loss"].mean(axis=0)) for n, r in ranked.items()}
    run.figure("rankings", figures.line_plot(loss, "Rankings whole or as pairs", "passes over the rankings", "held-out loss"))


def main(config, run):
    labs = lab.make(config.length, width=config.width, layers=config.layers)
    data = jax.jit(jax.vmap(partial(prepare, labs, config)))(jax.random.split(jax.random.key(config.seed), config.seeds))
    gaps = jax.device_get(data["gold"]["chosen"] - data["gold"]["rejected"])
    ceiling = np.array([reward_checks.noise_ceiling(config.sharpness * gap) for gap in gaps])
    curves, ranked = by_pairs(labs, config, data), by_rankings(labs, config, data)
    m = measure(config, curves, ranked, ceiling)
    claims = claims_of(config, m)
    draw(config, run, m, curves, ranked)
    run.finish({name: x.mean() for name, x in m.items()}, claims, findings=findings_of(config, m, claims))


if __name__ == "__main__":
    launch.run(main, "studies.reward_model")
