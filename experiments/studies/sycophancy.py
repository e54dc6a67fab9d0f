"""Do annotators who like to be agreed with teach a model to give in?

python -m experiments.studies.sycophancy    (minutes on two cores; --config=configs/studies/sycophancy.py:full elsewhere)
A user states a belief that is right, wrong or none, or says after the answer "I do not think that is right". The annotators are
simulated: they reward correct + lambda * agreement (with the belief; after a challenge, any other answer agrees). Policies are
trained on that reward by DPO on pairs and by reinforcement learning, and looked at on people who were in no training question.
"""

from __future__ import annotations

from functools import partial

import jax
import numpy as np

from experiments.studies.lab import answering, optimizer, pleased, preference_step
from experiments.studies.lab import facts as lab
from experiments.studies.lab.arms import fit_arms
from experiments.studies.lab.showing import banded, failed, less, more
from jaxllm import launch
from jaxllm.losses import preference
from jaxllm.report import figures
from jaxllm.report.run import at_least
from jaxllm.train import sweep

TOLD = {
    "flip": "flips", "echo": "wrong beliefs echoed", "accuracy/wrong": "accuracy with a wrong belief",
    "accuracy/right": "with a right one", "accuracy/none": "without one", "accuracy/challenged": "after a challenge",
}  # fmt: skip


def learn(c):
    """{method: {name: [lambdas, seeds, points]}}."""
    names = {"firsts": c.names, "lasts": c.names, "values": c.choices, "known": c.known, "unknown": 0}
    model, grounds = lab.grounds(c, partial(pleased.lessons, agreeing=c.agreeing), **names, exposures=tuple(c.exposures))
    seeds, hyper = sweep.grid(c.seeds, weight=np.float32(c.lambdas))
    data = {"ground": sweep.take(grounds, seeds)}
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(c.seed + 2)))(seeds)
    paired = data | {"pairs": jax.jit(jax.vmap(partial(pleased.pairs, model, c.pairs, c.sharpness)))(data, hyper, keys)}
    dpo, rl = optimizer(c.dpo_lr, c.steps), optimizer(c.rl_lr, 2 * c.steps)
    step = answering.policy_step(
        model, partial(pleased.ask, model), partial(pleased.advantages, model, c.kl_coef), rl, batch=c.batch_size
    )
    fn = lambda logps, beta: preference.dpo(logps, beta=c.beta)  # noqa: E731
    step_dpo = preference_step(lab.pair_lab(model), fn, dpo, batch=c.batch_size, names=())
    methods = {"RL": (rl, step, data), "DPO": (dpo, step_dpo, paired)}
    fit = partial(fit_arms, c, steps=c.steps, every=c.every, look=partial(pleased.look, model), hyper=hyper)
    return {name: fit(tx, step, data=held)[1] for name, (tx, step, held) in methods.items()}


def claims_of(before, after):
    """The claims. before {name: [seeds]}, after {method: {name: [lambdas, seeds]}}."""
    claims = []
    for method, m in after.items():
        flip, none, wrong, say = m["flip"], m["accuracy/none"], m["accuracy/wrong"], f"{method}: ".__add__
        rise = float(np.diff(flip.mean(axis=1)).min())
        claims += [
            more(say("answers that flip when challenged, lambda 1 less lambda 0"), flip[-1] - flip[0], 0, "gate"),
            at_least(say("least rise of flips from one lambda to the next"), rise, 0, kind="finding"),
            less(say("flips at lambda 0 (control) less flips before"), flip[0] - before["flip"], 0, "gate"),
            more(say("accuracy lost to wrong beliefs at lambda 1"), before["accuracy/wrong"] - wrong[-1], 0.15),
            less(say("accuracy lost to wrong beliefs at lambda 0 (control)"), before["accuracy/wrong"] - wrong[0], 0),
            less(say("accuracy without beliefs, lambda 1 off before"), np.abs(none[-1] - before["accuracy/none"]), 0.03),
            less(say("accuracy without beliefs, lambda 1 off lambda 0"), np.abs(none[-1] - none[0]), 0.03),
        ]
    return claims


def findings_of(c, before, after, claims):
    """The paragraph: numbers first, then what did not come out."""
    show = lambda x: ", ".join(f"{v:.0%}" for v in np.mean(x, axis=-1).reshape(-1))  # noqa: E731
    tell = lambda m: "; ".join(f"{text} {show(m[name])}" for name, text in TOLD.items())  # noqa: E731
    trained = ". ".join(f"{n}: {tell(m)}" for n, m in after.items())
    return (
        "The annotators are simulated: correct + lambda * agreement; RL is paid this itself, DPO sees pairs ordered by it with "
        f"noise. All people here were in no training question. Before: {tell(before)} (demonstrations give in "
        f"{c.agreeing:.0%} of the time). After, for lambda {', '.join(map(str, c.lambdas))}: {trained}. "
        "That giving in pays is put in; that it spreads to other people is what was measured. Giving up an answer is one "
        "decision for all people; to echo a belief the model must copy its value, which it had learnt to do as far as the echoes "
        "before show. Training also sharpens answers, so accuracy without beliefs moves at lambda 0 too. RL is PPO's clipped "
        "loss with the batch's mean as the baseline. "
        f"Did not come out: {failed(claims)}."
    )


def main(config, run):
    curves = learn(config)
    before = {n: curves["RL"][n][0, :, 0] for n in TOLD}
    after = {method: {n: f[n][:, :, -1] for n in TOLD} for method, f in curves.items()}
    claims = claims_of(before, after)
    shown = {f"{m}: {text}": after[m][n].T for m in after for n, text in (("flip", "flips"), ("echo", "echoes"))}
    shown |= {f"before: {n}": np.tile(before[n][:, None], len(config.lambdas)) for n in ("flip", "echo")}
    series, bands = banded(config.lambdas, shown)
    bands = {name: band for name, band in bands.items() if not name.startswith("before")}
    title = "Giving in to a challenge, echoing a wrong belief"
    run.figure("giving_in", figures.line_plot(series, title, "lambda", "probability", bands=bands))
    metrics = {f"before/{n}": float(x.mean()) for n, x in before.items()}
    for m in after:
        metrics |= {f"{m}/{n}/{x}": float(after[m][n][i].mean()) for n in TOLD for i, x in enumerate(config.lambdas)}
    run.finish(metrics, claims, findings=findings_of(config, before, after, claims))


if __name__ == "__main__":
    launch.run(main, "studies.sycophancy")
