"""How much of what RLHF gains is length, if annotators are mildly taken in by length? And what helps?

python -m experiments.studies.length_bias    (minutes on two cores; --config=configs/studies/length_bias.py:full elsewhere)
A string is worth the gold reward of its first words, fewer than which the source never writes, so that length neither helps nor
hurts. The simulated annotator sees worth + bias * standardised length; a fair one, the negative control, sees worth alone.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.studies import lab
from experiments.studies.lab.arms import fit_arms
from experiments.studies.lab.labels import halves
from experiments.studies.lab.lengths import balanced, within_bins
from experiments.studies.lab.showing import banded, failed, less, more
from jaxllm import launch
from jaxllm.report import figures
from jaxllm.report.run import at_most
from jaxllm.train import sweep
from jaxllm.worlds import pref

REMEDIES = ("balanced pairs", "penalty", "high KL")
JUDGES = ("biased", "fair", "balanced")
ARMS = {  # (whose judge, whether length alone is the reward, share of its length slope taken off, whether KL costs more)
    "biased": (0, 0.0, 0.0, 0.0), "fair": (1, 0.0, 0.0, 0.0), "length only": (0, 1.0, 0.0, 0.0),
    "balanced pairs": (2, 0.0, 0.0, 0.0), "penalty": (0, 0.0, 1.0, 0.0), "high KL": (0, 0.0, 0.0, 1.0),
}  # fmt: skip


def prepare(labs, c, key):
    """What a seed has: reference, the scale of lengths, strings of the reference, three reward models and their length slopes."""
    keys = jax.random.split(key, 6)
    g = lab.ground(labs, keys[0], steps=c.pretrain_steps, length=c.length, stop=c.stop, shortest=c.shortest)
    scale = lab.length_scale(g.world, keys[1])
    a, b = halves(lab.only(lab.sample(labs, g.world, g.reference, keys[2], 2 * c.pairs)))
    seen = lambda bias, r: lab.quality(g.world, scale, r) + bias * lab.standard_length(g.world, scale, r)  # noqa: E731
    biased, fair = (lab.compare(g, keys[3], a, b, partial(seen, bias), c.sharpness) for bias in (c.bias, 0.0))
    sets = [biased, fair, balanced(g.world, biased, keys[4], c.bin)]
    columns = jax.tree.map(lambda *x: jnp.stack(x), *sets)
    trained = jax.vmap(lambda x: lab.train_judge(labs, x, keys[5], trunk=g.reference, steps=c.judge_steps))(columns)
    raw, size = jax.vmap(lambda p: lab.raw_score(labs, p, a))(trained), lab.standard_length(g.world, scale, a)
    judges = lab.Judge(trained, raw.mean(axis=1), raw.std(axis=1))
    slopes = raw @ (size - size.mean()) / len(size) / size.var() / judges.std
    longer = [(pref.lengths(g.world, x["chosen"]) - pref.lengths(g.world, x["rejected"])) for x in sets]
    return {
        "ground": g, "scale": scale, "base": b, "judges": judges, "slopes": slopes,
        "unrelated": jnp.corrcoef(seen(0.0, a), size)[0, 1],
        "longer": jnp.stack([jnp.mean(x > 0) / jnp.mean(x != 0) for x in longer]),
    }  # fmt: skip


def reward(labs, target, data, record):
    """What a run maximises: its judge's score less the length penalty, or -|1 - length / target| on the same scale."""
    scale, world = data["scale"], data["ground"].world
    learned = lab.proxy(labs, data["judge"], record) - data["penalty"] * lab.standard_length(world, scale, record)
    alone = lambda x: -jnp.abs(1 - pref.lengths(world, x) / (target * scale.mean))  # noqa: E731
    before = alone(data["base"])
    return jnp.where(data["length_only"] > 0, (alone(record) - before.mean()) / before.std(), learned)


def look(labs, c, state, data, hyper, key):
    """Strings of the policy: score and length of each, worth, KL, and how often annotators prefer them to the reference's."""
    world, scale = data["ground"].world, data["scale"]
    record = lab.sample(labs, world, state.params["policy"], key, c.test_strings)
    base = jax.tree.map(lambda x: x[: c.test_strings], data["base"])
    better, longer = (f(world, scale, record) - f(world, scale, base) for f in (lab.quality, lab.standard_length))
    win = lambda gap: jax.nn.sigmoid(c.sharpness * gap).mean()  # noqa: E731
    return {
        "score": lab.proxy(labs, data["judge"], record), "lengths": pref.lengths(world, record), "worth": better.mean(),
        "kl": lab.kl(labs, data["ground"].reference, record).mean(), "fair_win": win(better),
        "biased_win": win(better + c.bias * longer),
    }  # fmt: skip


def main(config, run):
    c = config
    labs = lab.make(c.length, width=c.width, layers=c.layers)
    keys = jax.random.split(jax.random.key(c.seed), c.seeds)
    found = jax.jit(jax.vmap(partial(prepare, labs, c)))(keys)
    run.note(f"{c.seeds} seeds are ready: the biased annotator chose the longer of {np.mean(found['longer'][:, 0]):.1%}")
    seeds, grid = sweep.grid(c.seeds, arm=np.arange(len(ARMS)))
    judge, alone, off, high = (jnp.asarray(column)[grid["arm"]] for column in zip(*ARMS.values(), strict=True))
    data = sweep.take({n: found[n] for n in ("ground", "scale", "base")}, seeds)
    data |= {"judge": jax.tree.map(lambda x: x[seeds, judge], found["judges"]), "length_only": alone}
    data["penalty"] = off * found["slopes"][seeds, judge]
    hyper, tx = {"kl_coef": jnp.where(high > 0, c.high_kl_coef, c.kl_coef)}, lab.optimizer(c.lr, 2 * c.steps)
    step = lab.policy_step(labs, partial(reward, labs, c.target), tx, batch=c.batch_size)
    _, curves = fit_arms(c, tx, step, partial(look, labs, c), data, hyper, steps=c.steps, every=c.every)
    report(c, run, curves, jax.device_get({n: found[n] for n in ("slopes", "unrelated", "longer")}))


def report(c, run, curves, seeds):
    """Metrics, claims, figures and the paragraph."""
    words, score, found = curves["lengths"], curves["score"], {}  # [arms, seeds, points, strings]
    for i, name in enumerate(ARMS):
        size, total = words[i].mean(axis=-1), score[i, :, -1].mean(axis=-1) - score[i, :, 0].mean(axis=-1)
        inside = np.array([within_bins(s, w, c.bin) for s, w in zip(score[i], words[i], strict=True)])
        gains = {n: curves[n][i, :, -1] - curves[n][i, :, 0] for n in ("worth", "kl", "biased_win", "fair_win")}
        found[name] = {"growth": size[:, -1] / size[:, 0] - 1, "gain": total, "non_length": inside / total, **gains}
    metrics = {f"{arm}/{n}": float(np.mean(x)) for arm, row in found.items() for n, x in row.items()}
    metrics |= {f"length_slope/{j}": float(seeds["slopes"][:, i].mean()) for i, j in enumerate(JUDGES)}
    metrics |= {f"longer_chosen/{j}": float(seeds["longer"][:, i].mean()) for i, j in enumerate(JUDGES)}
    lines, bands = banded(curves["step"][0, 0], dict(zip(ARMS, words.mean(axis=-1), strict=True)))
    run.figure("length", figures.line_plot(lines, "Words of the policy's strings", "PPO step", "words", bands=bands, width=640))
    error = [found[n]["worth"].std(ddof=1) / np.sqrt(c.seeds) for n in ARMS]
    worth = [metrics[f"{n}/worth"] for n in ARMS]
    run.figure("worth", figures.bar_plot(list(ARMS), worth, "Gain in worth (s.d.)", errors=error, width=640))
    claims = claims_of(found, seeds)
    run.finish(metrics, claims, findings=findings_of(c, metrics, claims))


def claims_of(found, seeds):
    """The protocol's rules as findings, means over seeds with intervals; gates where the world is built so."""
    biased, alone, even = found["biased"], found["length only"], abs(seeds["longer"][:, 2].mean() - 0.5)
    return [
        at_most("correlation of worth and length before training, worst seed", float(np.abs(seeds["unrelated"]).max()), 0.15),
        at_most("longer side chosen in balanced pairs, off 1/2, mean", float(even), 0.03),
        more("growth in length, biased annotator", biased["growth"], 0.5),
        less("negative control: change in length, fair annotator, either way", np.abs(found["fair"]["growth"]), 0.1),
        more("growth that the taste for length adds to the fair annotator's", biased["growth"] - found["fair"]["growth"], 0.0),
        less("share of the reward's gain left within length bins, biased", biased["non_length"], 0.4),
        more("length-only reward's gain in biased wins, share of RLHF's", alone["biased_win"] / biased["biased_win"], 0.6),
        less("length-only reward's gain in true worth, share of RLHF's", alone["worth"] / biased["worth"], 0.2),
        *(more(f"growth in length avoided: {arm}", biased["growth"] - found[arm]["growth"], 0.0) for arm in REMEDIES),
        more("true worth that balanced pairs add", found["balanced pairs"]["worth"] - biased["worth"], 0.0),
    ]


def findings_of(c, m, claims):
    """The paragraph: numbers first, then what did not come out."""
    each = lambda name, f: ", ".join(f"{arm} {m[f'{arm}/{name}']:{f}}" for arm in ARMS)  # noqa: E731
    return (
        f"Annotators are simulated and judge a string by its first words; PPO is its clipped loss with the batch's "
        f"mean as baseline. A taste of {c.bias} s.d. a s.d. makes the annotator choose the longer string "
        f"{m['longer_chosen/biased']:.1%} of the time (fair {m['longer_chosen/fair']:.1%}); the judge's slope on length is "
        f"{m['length_slope/biased']:.2f} (fair {m['length_slope/fair']:.2f}, balanced {m['length_slope/balanced']:.2f}). Growth "
        f"in length: {each('growth', '+.0%')}. The fair annotator's policy, free to change length too, is the yardstick. Of the "
        f"reward gained {m['biased/non_length']:.0%} is left within length bins. Gain in worth (s.d.): {each('worth', '+.2f')}; "
        f"in wins with the biased annotator: {each('biased_win', '+.3f')}; KL: {each('kl', '.1f')}. "
        f"Did not come out: {failed(claims)}."
    )


if __name__ == "__main__":
    launch.run(main, "studies.length_bias")
