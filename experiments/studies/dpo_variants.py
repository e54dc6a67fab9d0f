"""Which preference loss, under which noise, on how few pairs? Six losses on one world, and exact facts of a bandit.

python -m experiments.studies.dpo_variants    (minutes on two cores; --config=configs/studies/dpo_variants.py:full elsewhere)
Labels order two strings of one length by gold, then some are flipped; in each cell a simulated annotator's votes on fresh strings
choose one of four strengths of each loss. In a second world strings end where they like, are judged by their first words, and the
annotator is taken in by length. No ranking is claimed. Negative control: labels at random.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.studies import lab
from experiments.studies.lab.arms import fit_arms
from experiments.studies.lab.labels import halves
from experiments.studies.lab.showing import banded, failed, less, more
from experiments.studies.lab.variants import VARIANTS, margins, picked_step
from jaxllm import launch
from jaxllm.report import figures
from jaxllm.report.run import at_least, at_most
from jaxllm.train import sweep
from jaxllm.worlds import pref

TAU = 0.5  # the beta of every loss on the bandit


def annotator(c, ground, scale):
    """What counts for who votes, [n] of records: gold where strings have one length, worth and a taste for length elsewhere."""
    if not ground.world.stop:
        return partial(lab.gold, ground)
    worth, length = (partial(f, ground.world, scale) for f in (lab.quality, lab.standard_length))
    return lambda record: worth(record) + c.bias * length(record)


def prepare(labs, c, stop, key):
    """What a seed has: its reference, ordered pairs with their chances to be flipped, and what reference strings are worth."""
    keys = jax.random.split(key, 5)
    g = lab.ground(labs, keys[0], steps=c.pretrain_steps, length=c.length, stop=stop, shortest=c.shortest if stop else c.length)
    scale = lab.length_scale(g.world, keys[1])
    a, b = halves(lab.sample(labs, g.world, g.reference, keys[2], 2 * c.many))
    worth = annotator(c, g, scale)
    columns = lab.compare(g, keys[3], a, b, worth, c.sharpness if stop else 1e4)  # 1e4: exact, of equal ones either
    pairs = lab.with_reference(labs, g.reference, columns) | {"chance": jax.random.uniform(keys[4], (c.many,))}
    return {"ground": g, "scale": scale, "pairs": pairs, "worth": worth(a)}


def look(labs, c, state, data, hyper, key):
    """Gold, KL and length of fresh strings, and the share of the annotator's votes against the reference's strings."""
    g, keys = data["ground"], jax.random.split(key)
    record = lab.sample(labs, g.world, state.params["policy"], keys[0], c.test_strings + c.votes)
    worth = annotator(c, g, data["scale"])(record)
    votes = pref.prefer(keys[1], worth[c.test_strings :], data["worth"][: c.votes], sharpness=c.sharpness)
    seen = {"gold": lab.gold(g, record), "kl": lab.kl(labs, g.reference, record), "length": pref.lengths(g.world, record)}
    return {"votes": votes.mean(), **{n: x[: c.test_strings].mean() for n, x in seen.items()}}


def cells_of(c):
    """{name: (pairs, noise)} of strings of one length: few and many pairs under each noise, and random labels."""
    cells = {f"{n} pairs, noise {noise:g}": (n, noise) for n in (c.few, c.many) for noise in c.noise}
    return {**cells, "random labels": (c.many, 0.5)}


def train(labs, c, data, cells, losses):
    """{loss: {metric: [cells, seeds]}} at the strength tuned in each cell. Which loss counts is data: one program holds all."""
    table, numbers = np.array([c.betas[n] for n in VARIANTS], np.float32), [list(VARIANTS).index(n) for n in losses]
    seeds, grid = sweep.grid(c.seeds, which=numbers, cell=np.arange(len(cells)), strength=np.arange(table.shape[1]))
    hyper = {n: jnp.asarray(x)[grid["cell"]] for n, *x in zip(("pairs", "noise"), *cells.values(), strict=True)}
    hyper |= {"which": grid["which"], "beta": jnp.asarray(table)[grid["which"], grid["strength"]]}
    data, tx = sweep.take(data, seeds), lab.optimizer(c.lr, c.steps)
    looks = {"steps": c.steps, "every": c.steps}
    _, curves = fit_arms(c, tx, picked_step(labs, tx, batch=c.batch_size), partial(look, labs, c), data, hyper, **looks)
    curves = {n: x.reshape(len(losses), len(cells), -1, c.seeds, 2) for n, x in curves.items()}
    curves["gained"] = curves["gold"] - curves["gold"][..., :1]
    best = curves["votes"][..., 1].mean(axis=3).argmax(axis=2)
    pick = lambda x, i: x[i, np.arange(len(cells)), best[i], :, 1]  # noqa: E731
    found = {name: {n: pick(x, i) for n, x in curves.items()} for i, name in enumerate(losses)}
    return {name: row | {"beta": table[numbers[i], best[i], None]} for i, (name, row) in enumerate(found.items())}


def main(config, run):
    c = config
    labs = lab.make(c.length, width=c.width, layers=c.layers)
    keys, found = jax.random.split(jax.random.key(c.seed), c.seeds), {}
    even, uneven = (jax.jit(jax.vmap(partial(prepare, labs, c, stop)))(keys) for stop in (0.0, c.stop))
    run.note(f"{c.seeds} seeds are ready")
    for i in range(0, len(VARIANTS), c.at_once):
        found |= train(labs, c, even, cells_of(c), list(VARIANTS)[i : i + c.at_once])
    ends = train(labs, c, uneven, {"length bias": (c.many, 0.0)}, list(VARIANTS))
    found = {n: {m: np.concatenate([x, ends[n][m]]) for m, x in row.items()} for n, row in found.items()}
    report(c, run, found, {n: np.asarray(margins(VARIANTS[n], beta=TAU, steps=c.bandit_steps)) for n in ("dpo", "cdpo", "ipo")})


def report(c, run, found, walks):
    """Metrics, claims, figures and the paragraph."""
    cells, kept = [*cells_of(c), "length bias"], ("gold", "gained", "kl", "length", "votes", "beta")
    table = ((n, i, cell, m) for n in found for i, cell in enumerate(cells) for m in kept)
    metrics = {f"{n}/{cell}/{m}": float(found[n][m][i].mean()) for n, i, cell, m in table}
    for i, name in enumerate(("few", "many")):
        part = slice(i * len(c.noise), (i + 1) * len(c.noise))
        lines, bands = banded(c.noise, {n: row["gold"][part].T for n, row in found.items()})
        title = f"Gold after {c[name]} pairs, each loss tuned"
        run.figure(name, figures.line_plot(lines, title, "labels flipped", "gold (s.d.)", bands=bands))
    walk = {n: (np.log10(np.arange(1, c.bandit_steps + 1, 50)), x[::50]) for n, x in walks.items()}
    run.figure("bandit", figures.line_plot(walk, "Two outcomes, one always preferred", "log10 step", "log-odds"))
    claims = claims_of(c, found, walks)
    run.finish(metrics, claims, findings=findings_of(c, metrics, walks, claims))


def claims_of(c, found, walks):
    """Gates on the bandit, where the optimum is known; what the protocol expects of the losses, as findings."""
    last, grown = {n: float(x[-1]) for n, x in walks.items()}, {n: float(x[-1] - x[len(x) // 10 - 1]) for n, x in walks.items()}
    many = len(c.noise)  # the first cell of many pairs, and how many there are
    fall = {n: row["gold"][many] - row["gold"][2 * many - 1] for n, row in found.items()}
    others = np.min([row["length"][-1] for n, row in found.items() if n != "simpo"], axis=0)
    chance = np.max([row["gained"][-2] for row in found.values()], axis=0)
    return [
        at_most("bandit: IPO's margin off 1 / (2 tau)", abs(last["ipo"] - 1 / (2 * TAU)), 1e-3),
        at_most("bandit: cDPO's margin off log((1 - e) / e) / beta", abs(last["cdpo"] - np.log(9) / TAU), 1e-2),
        at_least("bandit: DPO's margin, growth over ten times the steps", grown["dpo"], 0.9 * np.log(10) / TAU),
        at_most("bandit: IPO's margin, growth over ten times the steps", abs(grown["ipo"]), 1e-3),
        *(more(f"gold lost to flipped labels of {c.many}: dpo less {n}", fall["dpo"] - fall[n], 0.0) for n in ("cdpo", "ipo")),
        more("gold gained by KTO from rows that are not paired, exact labels", found["kto"]["gained"][many], 0.0),
        less("words under a length-biased annotator, simpo less the shortest other", found["simpo"]["length"][-1] - others, 0.0),
        less("negative control: gold gained on random labels, best loss", chance, 0.2),
    ]  # fmt: skip


def findings_of(c, m, walks, claims):
    """The paragraph: numbers first, then what did not come out."""
    each = lambda cell, name, f: ", ".join(f"{n} {m[f'{n}/{cell}/{name}']:{f}}" for n in VARIANTS)  # noqa: E731
    text = "; ".join(f"{cell}: {each(cell, 'gold', '.2f')}" for cell in cells_of(c))
    return (
        f"Labels are simulated; simulated votes choose one of {len(c.betas['dpo'])} strengths of each loss. Gold (s.d. of the "
        f"reference's strings, all of {c.length} words): {text}. KL at {c.many} exact labels: "
        f"{each(f'{c.many} pairs, noise 0', 'kl', '.1f')}. Where strings end freely, words after labels of a length-biased "
        f"annotator: {each('length bias', 'length', '.1f')}; its votes for them: {each('length bias', 'votes', '.2f')}. "
        f"On the bandit DPO's log-odds are {walks['dpo'][-1]:.1f} after {len(walks['dpo'])} steps and grow with the logarithm of "
        f"the steps; IPO's stay at {walks['ipo'][-1]:.3f}. No ranking is claimed. Did not come out: {failed(claims)}."
    )


if __name__ == "__main__":
    launch.run(main, "studies.dpo_variants")
