"""Which method gets the most reward at the same distance from the reference: DPO, PPO, best-of-n, or fine-tuning?

python -m experiments.studies.dpo_ppo_frontier    (minutes; --config=configs/studies/dpo_ppo_frontier.py:full elsewhere)
All methods have the same pairs of the reference's strings, labelled by a simulated annotator (Bradley-Terry on twice the gap in
gold). Gold is the world's known reward in s.d. of the reference's strings. Points are chosen by gold on one half of the fresh
strings and measured on the other. "PPO, gold" is trained on the true reward and is no rival: it is the ceiling.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.studies import lab
from experiments.studies.lab import halves
from experiments.studies.lab.arms import fit_arms
from experiments.studies.lab.showing import along, failed, less, more
from jaxllm import launch
from jaxllm.evals import frontier, stats
from jaxllm.losses import preference
from jaxllm.report import figures
from jaxllm.report.run import at_least, at_most
from jaxllm.train import sweep
from jaxllm.worlds import pref

METHODS = ("DPO", "PPO", "PPO, gold", "best-of-n", "preferred FT", "unlikelihood")


def prepare(labs, c, key):
    """A seed's ground, pairs (and with shuffled labels), reward model, and the worth of fresh strings of the reference."""
    keys = jax.random.split(key, 5)
    world = pref.make(keys[0], length=c.length)
    reference = lab.pretrain(labs, world, keys[1], steps=c.pretrain_steps)
    seed = lab.stock(labs, world, reference, keys[2], c.pairs, c.strings)
    judge = lab.train_judge(labs, seed["pairs"], keys[3], steps=c.judge_steps)
    raw = lab.scores(labs, judge, seed["strings"])
    pairs = lab.with_reference(labs, reference, seed["pairs"])
    return {
        "ground": seed["ground"], "pairs": {"true": pairs, "shuffled": lab.shuffled(pairs, keys[4])},
        "judge": lab.Judge(judge, raw.mean(), raw.std()), "gold": lab.gold(seed["ground"], seed["strings"]),
        "proxy": (raw - raw.mean()) / raw.std(),
    }  # fmt: skip


def train(labs, c, data, kind, settings):
    """Curves {name: [settings, seeds, points]} of one kind of training on settings, which are rows of its scalars."""
    seeds, grid = sweep.grid(c.seeds, row=np.arange(len(settings)))
    value, flag = (jnp.asarray(x)[grid["row"]] for x in zip(*settings, strict=True))
    of_run = sweep.take({"ground": data["ground"], "base": data["gold"][:, :4096]}, seeds)
    if kind == "rl":
        of_run |= {"judge": sweep.take(data["judge"], seeds), "true": flag}
        score = lambda d, r: jnp.where(d["true"], lab.gold(d["ground"], r), lab.proxy(labs, d["judge"], r))  # noqa: E731
        tx = lab.optimizer(c.lr, c.rl_steps * c.epochs)
        step, hyper = lab.policy_step(labs, score, tx, batch=c.rl_batch, epochs=c.epochs), {"kl_coef": value}
        return fit_arms(c, tx, step, halves.look(labs, c.look), of_run, hyper, steps=c.rl_steps, every=c.rl_every)[1]
    true, shuffled = sweep.take(data["pairs"]["true"], seeds), sweep.take(data["pairs"]["shuffled"], seeds)
    of_run["pairs"] = jax.tree.map(lambda a, b: jnp.where(flag.reshape(-1, *[1] * (a.ndim - 1)), b, a), true, shuffled)
    fn, name = (preference.dpo, "beta") if kind == "dpo" else (preference.unlikelihood, "alpha")
    tx = lab.optimizer(c.lr, c.steps)
    step = lab.preference_step(labs, fn, tx, batch=c.batch_size, names=(name,))
    return fit_arms(c, tx, step, halves.look(labs, c.look), of_run, {name: value}, steps=c.steps, every=c.every)[1]


def measure(c, run):
    """{method: curves {name: [settings, seeds, points]}}, with "shuffled" (DPO) beside the methods, and parameter counts."""
    labs = lab.make(c.length, width=c.width, layers=c.layers, judge_width=c.judge_width)
    data = jax.jit(jax.vmap(partial(prepare, labs, c)))(jax.random.split(jax.random.key(c.seed), c.seeds))
    run.note(f"{c.seeds} seeds are ready: references, {c.pairs} pairs, reward models, {c.strings} strings")
    rows = lambda x, some: {n: v[some] for n, v in x.items()}  # noqa: E731
    k = len(c.betas), len(c.kl_coefs)
    dpo = train(labs, c, data, "dpo", [*((b, False) for b in c.betas), (c.control_beta, True)])
    run.note("DPO is done")
    tuned = train(labs, c, data, "tune", [(a, False) for a in c.alphas])
    run.note("fine-tuning is done")
    rl = train(labs, c, data, "rl", [(x, true) for true in (False, True) for x in c.kl_coefs])
    bon = halves.best_of(data["proxy"], data["gold"], c.best_of)
    curves = (rows(dpo, slice(k[0])), rows(rl, slice(k[1])), rows(rl, slice(k[1], None)), bon,
              rows(tuned, slice(1)), rows(tuned, slice(1, None)))  # fmt: skip
    size = lambda tree: sum(x[0].size for x in jax.tree.leaves(tree))  # noqa: E731
    sizes = {"policy": size(data["ground"].reference), "judge": size(data["judge"].params)}
    return dict(zip(METHODS, curves, strict=True)) | {"shuffled": rows(dpo, slice(k[0], None))}, sizes


def claims_of(c, found, areas, flops):
    """The protocol's two robust sub-claims as gates, the rest over seeds with intervals."""
    gold, win = ({m: halves.best(x, k) for m, x in found.items()} for k in ("gold", "win"))
    least = min(gold[m].min() for m in METHODS)
    over = min((gold[m] - gold["preferred FT"]).min() for m in ("DPO", "PPO", "best-of-n"))
    order = ("DPO", "best-of-n", "PPO", "preferred FT")
    low = int(np.argmin(c.betas))
    fall = found["DPO"]["logps/chosen"][low][:, -1] - found["DPO"]["logps/chosen"][low][:, 1]
    ahead = lambda a, b: more(f"hull area, {a} less {b}", areas[a] - areas[b], 0.0)  # noqa: E731
    return [
        at_least("gold over the reference's, any method and seed", least, 0.0),
        at_least("gold of DPO, PPO, best-of-n over preferred fine-tuning's, any seed", over, 0.0),
        ahead("DPO", "best-of-n"), ahead("DPO", "PPO"), ahead("DPO", "PPO, gold"), ahead("PPO", "best-of-n"),
        ahead("unlikelihood", "preferred FT"),
        *(more(f"win rate, {a} less {b}", win[a] - win[b], 0.0) for a, b in zip(order, order[1:], strict=False)),
        at_least("FLOPs to 95 % of the best gold, PPO over DPO", flops["PPO"] / flops["DPO"], 5.0, kind="finding"),
        less(f"change of the chosen strings' log-probability under DPO, beta {min(c.betas):g}", fall, 0.0),
        at_most("control: gold of DPO on shuffled labels, worst seed", gold["shuffled"].max(), 0.2, kind="finding"),
    ]  # fmt: skip


def report(c, run, measured):
    """Metrics, claims, the figure and the paragraph."""
    found, sizes = measured
    curves = {m: [halves.points(x, s) for s in range(c.seeds)] for m, x in found.items()}
    areas = {m: np.array([frontier.hull_area(*xy, c.limit) for xy in x]) for m, x in curves.items()}
    steps = [halves.steps_to_best(found[m]) for m in ("DPO", "PPO")]
    flops, at = halves.flops(c, sizes["policy"], sizes["judge"], *steps), np.linspace(0, c.limit, 31)
    metrics = {f"{m}/{k}": float(halves.best(x, k).mean()) for m, x in found.items() for k in ("gold", "kl", "win")}
    metrics |= {f"{m}/hull_area": float(x.mean()) for m, x in areas.items()} | {f"{m}/flops": x for m, x in flops.items()}
    bands = {m: frontier.curve_band(curves[m], at) for m in METHODS}
    lines = {m: (at, [i.mean for i in row]) for m, row in bands.items()}
    bands = {m: ([i.low for i in row], [i.high for i in row]) for m, row in bands.items()}
    title, x = "What each method reaches at each distance (concave hulls)", "KL from the reference (nats)"
    run.figure("frontier", figures.line_plot(lines, title, x, "gold (s.d.)", bands=bands, width=700, height=420))
    lines, bands = along({f"beta {b:g}": (found["DPO"]["kl"][i], found["DPO"]["gold"][i]) for i, b in enumerate(c.betas)})
    run.figure("dpo", figures.line_plot(lines, "DPO: gold along training", x, "gold (s.d.)", bands=bands, width=640))
    claims = claims_of(c, found, areas, flops)
    run.finish(metrics, claims, findings=findings_of(c, metrics, areas, claims))


def findings_of(c, m, areas, claims):
    """The paragraph: numbers first, then what did not come out."""
    at = "; ".join(f"{n} {m[f'{n}/gold']:.2f} at {m[f'{n}/kl']:.1f} nats (wins {m[f'{n}/win']:.0%})" for n in METHODS)
    area = ", ".join(f"{n} {stats.mean_interval(areas[n])}" for n in METHODS)
    return (
        f"Annotator and gold reward are simulated; all learn from the same {c.pairs} pairs; PPO is its clipped loss with "
        f"the batch's mean as baseline. Best gold, chosen and measured on different strings: {at}. Hull areas for KL up to "
        f"{c.limit:g} nats: {area}. PPO on the true reward is the ceiling, not a rival. To 95 % of their best gold DPO "
        f"takes {m['DPO/flops']:.1e} FLOPs and PPO {m['PPO/flops']:.1e}, with sampling and reward model. DPO on shuffled "
        f"labels: {m['shuffled/gold']:.2f}. The protocol's split into reasoning tasks (E46b) is not part of this study. Did "
        f"not come out: {failed(claims)}."
    )


def main(config, run):
    report(config, run, measure(config, run))


if __name__ == "__main__":
    launch.run(main, "studies.dpo_ppo_frontier")
