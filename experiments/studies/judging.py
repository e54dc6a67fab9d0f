"""Do ratings recover who is better when the judge is biased? Elo, Bradley-Terry, swapped sides and length control.

python -m experiments.studies.judging    (half a minute on a CPU; --config=configs/studies/judging.py:full for 30 seeds)
The judge is simulated: it prefers a over b with probability sigma(worth_a - worth_b + length_bias * (length_a - length_b)), and
adds position_bias to the side shown first. So what each correction ought to find is known.
"""

from __future__ import annotations

import numpy as np

from experiments.studies.lab.showing import failed, more
from jaxllm import launch
from jaxllm.evals import judge_bias, ratings, stats, winrate
from jaxllm.evals.reward_checks import spearman
from jaxllm.report import figures
from jaxllm.report.run import at_least, at_most

ARMS = ("fair judge", "biased", "swapped", "swapped, length", "position, length")


def judge(p, position_bias, rng):
    """(verdict with a shown first, verdict with b shown first), each for the side shown first: 0 or 1."""
    draw = lambda q: (rng.random(len(q)) < np.clip(q, 0, 1)).astype(float)  # noqa: E731
    return judge_bias.Swapped(draw(p + position_bias), draw(1 - p + position_bias))


def field(config, rng):
    """True worth and verbosity of every model, the pairs that meet, and the gaps between their answers' lengths (in s.d.)."""
    m, n = config.models, config.battles
    worth = config.step * (rng.permutation(m) - (m - 1) / 2)
    verbosity = rng.permutation(np.linspace(-1, 1, m))
    one = rng.integers(0, m, n)
    a, b = np.sort([one, (one + rng.integers(1, m, n)) % m], axis=0)  # as in a list: the same model of a pair always comes first
    lengths = verbosity[[a, b]] + rng.normal(size=(2, n))
    return worth, verbosity, a, b, lengths[0] - lengths[1]


def ask(arm, config, worth, a, b, gap, rng):
    """(battles, covariates, verdicts) of one way to ask the judge and to correct what it says."""
    fair, ones = arm == "fair judge", np.ones(len(a))
    p = stats.sigmoid(worth[a] - worth[b] + (0 if fair else config.length_bias) * gap)
    verdicts = judge(p, 0 if fair else config.position_bias, rng)
    outcome = judge_bias.swap_average(verdicts) if arm.startswith("swapped") else verdicts.a_first
    covariates = {"swapped, length": gap, "position, length": np.column_stack([gap, ones])}.get(arm)
    return ratings.battles(a, b, outcome, config.models), covariates, verdicts


def one_seed(config, seed):
    """Everything that one seed measures, as {name: number}, and the ratings that the figure shows."""
    rng = np.random.default_rng([config.seed, seed])
    worth, verbosity, a, b, gap = field(config, rng)
    true = ratings.START + ratings.SCALE * worth
    m, shown = {}, {"true": true}
    for arm in ARMS:
        battles, covariates, verdicts = ask(arm, config, worth, a, b, gap, rng)
        shown[arm] = ratings.bradley_terry(battles, covariates).ratings
        position = ratings.bradley_terry(battles, np.column_stack([gap, np.ones(len(a))])).coefficients[1]
        m[f"{arm}/spearman"] = spearman(shown[arm], worth)
        m[f"{arm}/length_slope"] = float(np.polyfit(verbosity, (shown[arm] - true) / ratings.SCALE, 1)[0])
        m[f"{arm}/error"] = float(np.sqrt(np.mean((shown[arm] - true) ** 2)))
        m[f"{arm}/position"] = float(position)  # log-odds of the side listed first, whoever it is
        if arm == "fair judge":
            m |= orders(config, battles, worth, rng)
        if arm == "swapped, length":
            draws = ratings.bootstrap_ratings(battles, covariates, n=config.resamples, seed=seed)
            spread, rank = ratings.rank_spread(*ratings.rating_bounds(draws)), 1 + (worth[None] > worth[:, None]).sum(axis=1)
            m["spread/holds_true_rank"] = float(((spread[:, 0] <= rank) & (rank <= spread[:, 1])).mean())
            m["position_bias"] = judge_bias.position_bias(verdicts).mean
            shown["spread"] = ratings.spread_text(spread)
    return {**m, **length_control(config, rng)}, shown


def orders(config, battles, worth, rng):
    """How much the order of the battles decides: online Elo over shuffles, and Bradley-Terry over the first five of them."""
    order, m = ratings.shuffles(config.battles, config.shuffles, int(rng.integers(2**31))), {}
    for k in (4, 32):
        elo = ratings.elo(battles, k=k, orders=order)
        found = [spearman(row, worth) for row in elo]
        m |= {f"elo{k}/deviation": float(elo.std(axis=0).mean()), f"elo{k}/worst_spearman": float(min(found))}
        m |= {f"elo{k}/sum_error": float(np.abs(elo.sum(axis=1) - config.models * ratings.START).max())}
    shuffled = [ratings.Battles(battles.a[o], battles.b[o], battles.outcome[o], config.models) for o in order[:5]]
    return {**m, "bt/deviation": float(np.std([ratings.bradley_terry(s).ratings for s in shuffled], axis=0).mean())}


def length_control(config, rng):
    """Win rates of a model that is exactly as good as the baseline, but one s.d. longer."""
    length, base = rng.normal(size=(2, config.battles)) + np.array([[1.0], [0.0]])
    p = stats.sigmoid(config.length_bias * (length - base))
    preference = judge_bias.swap_average(judge(p, config.position_bias, rng))
    controlled = winrate.length_controlled(preference, length, base, resamples=2)
    return {"win_rate/plain": winrate.win_rate(preference).mean, "win_rate/length_controlled": controlled.mean}


def claims_of(config, found):
    """The claims: means with intervals over seeds, or the worst seed where a claim must hold in each."""
    over = lambda name: np.array([m[name] for m in found])  # noqa: E731
    removed = np.abs(over("swapped/length_slope")) - np.abs(over("swapped, length/length_slope"))
    cost = over("fair judge/spearman") - over("biased/spearman")
    length_off = np.abs(over("win_rate/length_controlled") - 0.5)
    return [
        more("rank correlation, fair judge, Bradley-Terry", over("fair judge/spearman"), 0.95, "gate"),
        more("rank correlation, biased judge, swapped and length controlled", over("swapped, length/spearman"), 0.95, "gate"),
        more("rank correlation that the biases cost in one order, uncorrected", cost, 0.05),
        more("rank correlation, biased judge, controlled without swapping", over("position, length/spearman"), 0.95),
        more("rank correlation, fair judge, Elo (K = 32), worst order", over("elo32/worst_spearman"), 0.95),
        at_most("Elo's sum off its start, any seed", max(over("elo4/sum_error").max(), over("elo32/sum_error").max()), 1e-6),
        at_least("points that Elo (K = 4) moves over shuffles, least seed", over("elo4/deviation").min(), 1.0),
        at_most("points that Bradley-Terry moves over shuffles, worst seed", over("bt/deviation").max(), 1e-3),
        more("position bias that the probe finds", over("position_bias"), 0.75 * config.position_bias, "gate"),
        more("log-odds of being listed first, one order", over("biased/position"), 0.5, "gate"),
        at_most("log-odds of being listed first, swapped, either way", abs(over("swapped/position").mean()), 0.1),
        at_least("length slope of ratings that control removes, least seed", removed.min(), 0.0),
        at_most("length-controlled win rate of an equal, longer model, off 1/2, worst seed", length_off.max(), 0.03),
        more("rank spreads that hold the true rank", over("spread/holds_true_rank"), 0.95),
    ]  # fmt: skip


def findings_of(m, claims, spread):
    """The paragraph: numbers first, then what did not come out."""
    three = ("biased", "swapped", "swapped, length")
    order, error = (", ".join(f"{m[f'{arm}/{x}']:{f}}" for arm in three) for x, f in (("spearman", ".2f"), ("error", ".0f")))
    return (
        "The judge is simulated, with biases that were put in. Rank correlation with the truth: fair "
        f"{m['fair judge/spearman']:.2f}; biased in one order, swapped, and swapped with a length covariate {order}, the ratings "
        f"{error} points off. Swapping removes the position bias, not the taste for length: the ratings' slope on length is "
        f"{m['swapped/length_slope']:.2f} log-odds a s.d., {m['swapped, length/length_slope']:.2f} with the covariate. With the "
        f"order of the same battles Elo moves by {m['elo4/deviation']:.0f} points (K = 4), {m['elo32/deviation']:.0f} (K = 32), "
        f"Bradley-Terry by {m['bt/deviation']:.0e}. A longer model of equal worth wins {m['win_rate/plain']:.1%}, under length "
        f"control {m['win_rate/length_controlled']:.1%}. Rank spreads of the first seed, best first: {', '.join(spread)}. "
        f"Did not come out: {failed(claims)}."
    )


def main(config, run):
    results = [one_seed(config, seed) for seed in range(config.seeds)]
    metrics = {name: float(np.mean([m[name] for m, _ in results])) for name in results[0][0]}
    shown, ranks = results[0][1], np.arange(1, config.models + 1)
    best = np.argsort(-shown["true"])
    series = {arm: (ranks, shown[arm][best]) for arm in ("true", "biased", "swapped", "swapped, length")}
    run.figure("ratings", figures.line_plot(series, "Ratings of one seed", "true rank", "rating points"))
    errors = [metrics[f"{arm}/error"] for arm in ARMS]
    run.figure("errors", figures.bar_plot(ARMS, errors, "Rating points off the truth (r.m.s.)", width=640))
    claims = claims_of(config, [m for m, _ in results])
    run.finish(metrics, claims, findings=findings_of(metrics, claims, [shown["spread"][i] for i in best]))


if __name__ == "__main__":
    launch.run(main, "studies.judging")
