"""What does a policy forget when reward alone is maximised, and do a KL penalty or pretraining text (PPO-ptx) keep it?

python -m experiments.studies.forgetting    (minutes; --config=configs/studies/forgetting.py:full elsewhere)
The policy is pretrained on two skills: the source's strings, and to copy: a marker, three random words, and these three again and
again. RL sees only strings. Measured: nats a token on fresh strings of the source, and copying (share of whole patterns right).
The reward model is learned from 1,000 pairs labelled by a simulated annotator; rewards are in s.d. of the reference's strings.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.studies import lab
from experiments.studies.lab import skills
from experiments.studies.lab.arms import fit_arms
from experiments.studies.lab.showing import along, failed, less, more
from jaxllm import launch
from jaxllm.losses import lm
from jaxllm.report import figures
from jaxllm.report.run import at_least, at_most
from jaxllm.train import sweep
from jaxllm.worlds import pref


def prepare(labs, c, key):
    """A seed's ground (pretrained on both skills), reward model, and fresh text to measure on."""
    keys = jax.random.split(key, 7)
    world = pref.make(keys[0], length=c.length)
    params = {"policy": lab.fresh(labs.model, keys[1])}
    batch_of = lambda k: skills.text(world, k, 2 * c.batch_size)  # noqa: E731
    tx = lab.optimizer(2e-3, c.pretrain_steps)
    reference = lab.train(lm.loss(labs.model), tx, params, batch_of, keys[2], c.pretrain_steps)["policy"]
    seed = lab.stock(labs, world, reference, keys[3], c.pairs, 2048)
    judge = lab.train_judge(labs, seed["pairs"], keys[4], steps=c.judge_steps)
    raw = lab.scores(labs, judge, seed["strings"])
    fresh = {"strings": skills.strings(world, keys[5], c.look), "copies": skills.copies(world, keys[6], c.look)}
    return {"ground": seed["ground"], "judge": lab.Judge(judge, raw.mean(), raw.std()), "fresh": fresh}


def train(labs, c, data, settings):
    """Curves {name: [settings, seeds, points]} of RL on settings (kl_coef, ptx_coef, scale of the reward)."""
    seeds, grid = sweep.grid(c.seeds, row=np.arange(len(settings)))
    columns = (jnp.asarray(x, jnp.float32)[grid["row"]] for x in zip(*settings, strict=True))
    hyper = dict(zip(("kl_coef", "ptx_coef", "scale"), columns, strict=True))
    of_run = sweep.take(data, seeds) | {"scale": hyper["scale"]}
    score = lambda d, record: d["scale"] * lab.proxy(labs, d["judge"], record)  # noqa: E731
    tx = lab.optimizer(c.lr, c.steps * c.epochs)
    pretraining = lambda d, key: skills.text(d["ground"].world, key, c.batch_size)  # noqa: E731
    step = lab.policy_step(labs, score, tx, batch=c.batch_size, epochs=c.epochs, pretraining=pretraining)
    rewards = lab.observe(labs, c.look, proxy=lambda d, record: lab.proxy(labs, d["judge"], record))
    look = lambda s, d, h, key: rewards(s, d, h, key) | skills.skills(labs, s.params["policy"], d["fresh"])  # noqa: E731
    return fit_arms(c, tx, step, look, of_run, hyper, steps=c.steps, every=c.every)[1]


def measure(c, run):
    """{arm: curves {name: [seeds, points]}}."""
    labs = lab.make(c.length, width=c.width, layers=c.layers)
    data = jax.jit(jax.vmap(partial(prepare, labs, c)))(jax.random.split(jax.random.key(c.seed), c.seeds))
    run.note(f"{c.seeds} seeds are ready: references with two skills, reward models on {c.pairs} pairs")
    arms = {f"kl_coef {k:g}": (k, 0.0, 1.0) for k in c.kl_coefs}
    arms |= {f"ptx {p:g}": (0.0, p, 1.0) for p in c.ptx_coefs} | {"no reward": (0.0, 0.0, 0.0)}
    curves = train(labs, c, data, list(arms.values()))
    return {name: {n: x[i] for n, x in curves.items()} for i, name in enumerate(arms)}


def claims_of(c, found):
    """The protocol's rules, over seeds with intervals; what no reward must not do is arithmetic."""
    rise = {arm: x["nll/strings"][:, -1] - x["nll/strings"][:, 0] for arm, x in found.items()}
    gain = {arm: x["proxy"][:, -1] - x["proxy"][:, 0] for arm, x in found.items()}
    copied = {arm: x["copied"][:, -1] - x["copied"][:, 0] for arm, x in found.items()}
    free, hard, ptx = (f"kl_coef {min(c.kl_coefs):g}", f"kl_coef {max(c.kl_coefs):g}", f"ptx {max(c.ptx_coefs):g}")
    moved = max(float(np.abs(x[-1]).max()) for x in (rise["no reward"][None], copied["no reward"][None]))
    return [
        at_most("change of either skill under RL without a reward, any seed", moved, 1e-6),
        at_least("patterns copied before RL, worst seed", found[free]["copied"][:, 0].min(), 0.9, kind="finding"),
        more(f"nats a token that the source's strings lose, {free}", rise[free], 1.0),
        less(f"nats a token that the source's strings lose, {hard}", rise[hard], 0.2),
        more(f"reward gained with {hard}, share of {free}", gain[hard] / gain[free], 0.7),
        less(f"nats a token that the source's strings lose, {ptx}", rise[ptx], 0.2),
        more(f"reward gained with {ptx}, share of {free}", gain[ptx] / gain[free], 0.7),
        more(f"patterns that {free} unlearns to copy", -copied[free], 0.2),
        less(f"patterns that {hard} unlearns to copy", -copied[hard], 0.1),
        less(f"patterns that {ptx} unlearns to copy", -copied[ptx], 0.1),
        more(f"gold at the end, {ptx} less {free}", found[ptx]["gold"][:, -1] - found[free]["gold"][:, -1], 0.0),
    ]


def report(c, run, found):
    """Metrics, claims, figures and the paragraph."""
    names = ("nll/strings", "nll/copies", "copied", "proxy", "gold", "kl")
    metrics = {f"{arm}/{n}": float(x[n][:, -1].mean()) for arm, x in found.items() for n in names}
    metrics |= {f"before/{n}": float(next(iter(found.values()))[n][:, 0].mean()) for n in names}
    for name, title, label in (("nll/strings", "The source's strings", "nats a token"), ("copied", "Copying", "patterns right")):
        lines, bands = along({arm: (x["step"], x[name]) for arm, x in found.items()})
        title = f"{title} during RL on other things"
        run.figure(name.replace("/", "_"), figures.line_plot(lines, title, "step of RL", label, bands=bands, width=640))
    lines, bands = along({arm: (x["proxy"], x["nll/strings"]) for arm, x in found.items()})
    title = "What reward costs in nats"
    run.figure("cost", figures.line_plot(lines, title, "learned reward (s.d.)", "nats a token", bands=bands, width=640))
    claims = claims_of(c, found)
    run.finish(metrics, claims, findings=findings_of(found, metrics, claims))


def findings_of(found, m, claims):
    """The paragraph: numbers first, then what did not come out."""
    each = lambda name, f: ", ".join(f"{arm} {m[f'{arm}/{name}']:{f}}" for arm in found)  # noqa: E731
    return (
        "Annotator and gold reward are simulated; RL is PPO's clipped loss with the batch's mean as baseline. Strings of "
        f"the source cost {m['before/nll/strings']:.2f} nats a token before RL, after it: {each('nll/strings', '.2f')}. "
        f"Whole patterns copied: {m['before/copied']:.0%} before, then {each('copied', '.0%')}. Learned reward: "
        f"{each('proxy', '.2f')}; gold: {each('gold', '.2f')}; KL in nats a string: {each('kl', '.1f')}. The pretraining "
        f"text of ptx has both skills, so it shows copying again; RL itself never does. Did not come out: {failed(claims)}."
    )


def main(config, run):
    report(config, run, measure(config, run))


if __name__ == "__main__":
    launch.run(main, "studies.forgetting")
