"""What becomes of the true reward when a learned one is optimised, by RL and by best-of-n (arXiv 2210.10760)?

python -m experiments.studies.over_optimisation    (minutes; --config=configs/studies/over_optimisation.py:full elsewhere)
Gold is the world's known reward; the annotator is simulated (Bradley-Terry on twice the gap in gold). Rewards are in standard
deviations of the reference's strings, each reward model standardised by itself; KL is of whole strings, in nats.
"""

from __future__ import annotations

from functools import partial

import jax
import numpy as np

from experiments.studies import lab
from experiments.studies.lab import goodhart, selection
from experiments.studies.lab.showing import along, failed, less, more, show_strings
from jaxllm import launch
from jaxllm.report import figures
from jaxllm.report.run import at_least, at_most
from jaxllm.train import sweep
from jaxllm.worlds import pref


def prepare(labs, c, key):
    """A seed's ground, pairs (and with shuffled labels), and fresh strings of the reference for best-of-n."""
    keys = jax.random.split(key, 4)
    world = pref.make(keys[0], length=c.length)
    reference = lab.pretrain(labs, world, keys[1], steps=c.pretrain_steps)
    seed = lab.stock(labs, world, reference, keys[2], max(c.pairs), c.strings)
    g, strings = seed["ground"], seed["strings"]
    shuffled = lab.shuffled(seed["pairs"], keys[3])
    return seed | {"shuffled": shuffled, "gold": lab.gold(g, strings), "logp": strings["logps"].sum(axis=1)}


def one_width(c, run, data, width, penalties):
    """What reward models of one width show: {setting: (RL's curves, best-of-n or None, facts)}."""
    labs = lab.make(c.length, width=c.width, layers=c.layers, judge_width=width)
    keys = jax.random.split(jax.random.key(c.seed + 2), c.seeds)
    sizes, noise = [*c.pairs, c.main_pairs], np.arange(len(c.pairs) + 1) == len(c.pairs)
    judges = lambda seed, k: goodhart.judges(labs, seed, sizes, noise, k, steps=c.judge_steps, batch=c.judge_batch)  # noqa: E731
    judge, scores = jax.jit(jax.vmap(judges))(data, keys)
    scores, gold, logp = (np.asarray(x, np.float64) for x in (scores, data["gold"], data["logp"]))
    run.note(f"reward models of width {width} are ready")
    main = list(c.pairs).index(c.main_pairs)
    settings = {f"{n} pairs": (i, 0.0) for i, n in enumerate(c.pairs)} | {"shuffled": (len(c.pairs), 0.0)}
    settings |= {f"kl_coef {k:g}": (main, k) for k in penalties}
    policies, curves = goodhart.optimise(labs, c, data["ground"], judge, list(settings.values()))
    found = {}
    for row, (name, (i, kl_coef)) in enumerate(settings.items()):
        x = {n: values[row] for n, values in curves.items()}
        bon = selection.best_of(scores[:, i], gold, c.best_of) if kl_coef == 0 else None
        facts = goodhart.peak_facts(x) if bon is None else goodhart.judge_facts(c, x, bon, scores[:, i], gold, logp)
        found[name] = (x, bon, facts)
    g, text = sweep.take(data["ground"], 0), f"width {width}, {c.main_pairs} pairs, kl_coef 0"
    show_strings(run, labs, g, {"reference": g.reference, text: sweep.take(policies, main * c.seeds)}, c.steps)
    return found


def measure(c, run):
    """{width of the reward models: what they show}."""
    first = lab.make(c.length, width=c.width, layers=c.layers)
    data = jax.jit(jax.vmap(partial(prepare, first, c)))(jax.random.split(jax.random.key(c.seed), c.seeds))
    run.note(f"{c.seeds} seeds are ready: references, {max(c.pairs)} pairs, {c.strings} strings")
    last = c.judge_widths[-1]
    return {width: one_width(c, run, data, width, c.kl_coefs if width == last else ()) for width in c.judge_widths}


def claims_of(c, found):
    """The protocol's gates where the proxy is imperfect (up to 1,000 pairs), on means over seeds; the worst seed is a finding."""
    shown = {width: {name: facts for name, (_, _, facts) in x.items()} for width, x in found.items()}
    wide, note = shown[c.judge_widths[-1]], {"kind": "finding"}
    few, main, many = (wide[f"{n} pairs"] for n in (min(c.pairs), c.main_pairs, max(c.pairs)))
    soft, hard = (wide[f"kl_coef {f(c.kl_coefs):g}"] for f in (min, max))
    ratio = np.ma.masked_invalid([f["kl_ratio"] for name, f in wide.items() if name.endswith("pairs")]).mean(axis=0)
    judges = [f for x in shown.values() for f in x.values() if "kl_over" in f]
    fits = [np.mean([f[k][:, 2] for name, f in wide.items() if name.endswith("pairs")], axis=0) for k in ("rl_fit", "bon_fit")]
    narrow = shown[c.judge_widths[0]][f"{c.main_pairs} pairs"]
    arms = {f", {n} pairs": [x[f"{n} pairs"] for x in shown.values()] for n in c.pairs if n <= 1000}
    worst = lambda k: min(x[k].min() for widths in arms.values() for x in widths)  # noqa: E731
    return [
        at_least("looks from gold's peak to the nearer end, least seed", int(worst("inside")), 1),
        *(more(f"gold lost from its peak to the end{n}", x[-1]["lost"], 0.3, "gate") for n, x in arms.items()),
        *(more(f"proxy gained from there to the end{n}", x[-1]["proxy_rise"], 0.0, "gate") for n, x in arms.items()),
        at_least("gold lost from its peak to the end, least seed", worst("lost"), 0.3, **note),
        at_least("proxy gained from there to the end, least seed", worst("proxy_rise"), 0.0, **note),
        at_most("best-of-n's KL over log n - (n-1)/n, any n and seed", max(f["kl_over"].max() for f in judges), 1e-9),
        less(f"best-of-{c.match}'s KL over that bound, drawn strings", np.mean([f["drawn_over"] for f in judges], axis=0), 0.1),
        more(f"peak gold, {max(c.pairs)} less {min(c.pairs)} pairs", many["peak"] - few["peak"], 0.0),
        less(f"final gold lost to optimisation, {max(c.pairs)} less {min(c.pairs)} pairs", many["lost"] - few["lost"], 0.0),
        *([more("peak gold, widest less narrowest reward model", main["peak"] - narrow["peak"], 0.0)] if len(shown) > 1 else []),
        more(f"final gold, kl_coef {max(c.kl_coefs):g} less 0", hard["final"] - main["final"], 0.3),
        less(f"peak gold, kl_coef {min(c.kl_coefs):g} less 0 (early stopping: 0)", soft["peak"] - main["peak"], 0.15),
        more(f"RL's KL over best-of-{c.match}'s at equal proxy", ratio.compressed(), 2.0),
        more("R^2 of d (alpha - beta log d), RL", fits[0], 0.9), more("R^2 of d (alpha - beta d), best-of-n", fits[1], 0.9),
        more(f"gold lost by best-of-{max(c.best_of)} from its peak, {min(c.pairs)} pairs", few["bon_lost"], 0.1),
        at_most("control: peak gold on shuffled labels, worst seed", wide["shuffled"]["peak"].max(), 0.3, **note),
    ]  # fmt: skip


def report(c, run, found):
    """Metrics, claims, figures and the paragraph."""
    metrics = {f"{w}/{name}/{k}": v.mean(axis=0) for w, x in found.items() for name, y in x.items() for k, v in y[2].items()}
    metrics = {f"{k}/{i}" if v.size > 1 else k: float(u) for k, v in metrics.items() for i, u in enumerate(np.atleast_1d(v))}
    claims, wide = claims_of(c, found), found[c.judge_widths[-1]]
    root = lambda x: np.sqrt(np.maximum(x["kl"], 0))  # noqa: E731
    arms = [f"{n} pairs" for n in sorted({min(c.pairs), c.main_pairs, max(c.pairs)})]
    for i, title in ((0, "RL, kl_coef 0"), (1, "Best-of-n")):
        lines = {f"{what}, {arm}": (root(wide[arm][i]), wide[arm][i][what]) for arm in arms for what in ("proxy", "gold")}
        lines, bands = along(lines, "gold")
        title = f"{title}: proxy (on top) and gold reward"
        svg = figures.line_plot(lines, title, "square root of KL", "reward (s.d.)", bands=bands, width=680, height=400)
        run.figure(("over_optimisation", "best_of_n")[i], svg)
    arms = [f"{c.main_pairs} pairs", *(f"kl_coef {k:g}" for k in c.kl_coefs), "shuffled"]
    lines, bands = along({f"gold, {arm}": (root(wide[arm][0]), wide[arm][0]["gold"]) for arm in arms}, "kl_coef")
    title = f"RL with a KL penalty ({c.main_pairs} pairs)"
    run.figure("penalty", figures.line_plot(lines, title, "square root of KL", "gold (s.d.)", bands=bands, width=680))
    run.finish(metrics, claims, findings=findings_of(c, wide, claims))


def findings_of(c, wide, claims):
    """The paragraph: numbers first, then what did not come out."""
    facts = {name: x[2] for name, x in wide.items()}

    def of(k, f=".2f", i=slice(None)):
        return ", ".join(f"{np.nanmean(facts[f'{n} pairs'][k].T[i]):{f}}" for n in c.pairs)

    end = lambda name: f"{facts[name]['final'].mean():.2f} at {facts[name]['kl'].mean():.1f} nats"  # noqa: E731
    kls = "; ".join(f"{k:g}: {end(f'kl_coef {k:g}')}" for k in c.kl_coefs)
    return (
        "Annotator and gold reward are simulated; RL is PPO's clipped loss with the batch's mean as baseline. Reward "
        f"models on {', '.join(map(str, c.pairs))} pairs order strings as gold does {of('accuracy')} of the time. Optimised "
        f"without penalty, gold peaks at {of('peak')} (KL {of('peak_kl', '.1f')} nats) and ends at {of('final')} (KL "
        f"{of('kl', '.1f')}), while the proxy gains {of('proxy_rise')} after that peak. With {c.main_pairs} pairs gold "
        f"ends, by kl_coef, at 0: {end(f'{c.main_pairs} pairs')}; {kls}. Fits of RL: alpha {of('rl_fit', i=0)}, beta "
        f"{of('rl_fit', i=1)}, R^2 {of('rl_fit', i=2)}; of best-of-n: alpha {of('bon_fit', i=0)}, beta "
        f"{of('bon_fit', '.3f', i=1)}, R^2 {of('bon_fit', i=2)}. At the proxy of best-of-{c.match} RL's KL is "
        f"{of('kl_ratio')} times as large. Best-of-n's KL is that of the {c.strings} strings drawn, exactly: ties alone put "
        f"it below the bound; on drawn groups, with the reference's own probabilities, it is {of('drawn_over', '+.2f')} "
        f"nats off the bound at n = {c.match}. On shuffled labels gold peaks at {facts['shuffled']['peak'].mean():.2f} and "
        f"ends at {end('shuffled')}. Did not come out: {failed(claims)}."
    )


def main(c, run):
    report(c, run, measure(c, run))


if __name__ == "__main__":
    launch.run(main, "studies.over_optimisation")
