"""Does pay for right, hedged and no answers make a model say what it knows, and no more?

python -m experiments.studies.calibrated_reward    (minutes on two cores; --config=configs/studies/calibrated_reward.py:full)
John Schulman's table (2023): right 1, wrong -4, hedged right 0.5, hedged wrong -2, "I do not know" 0. First its algebra, exactly;
then a policy is trained with it, with a table by which hedging can pay, by imitating paid answers alone, and with shuffled pay.
The world is synthetic and gives every fact a known confidence: its texts contradict each other, and so does the truth.
"""

from __future__ import annotations

from fractions import Fraction
from functools import partial

import jax.numpy as jnp
import numpy as np

from experiments.studies.lab import answering, optimizer, paid
from experiments.studies.lab import facts as lab
from experiments.studies.lab.arms import fit_arms
from experiments.studies.lab.paid import BAND, LECTURE, NOTHING, crossing, hedging_pays, mean_where, threshold
from experiments.studies.lab.showing import along, failed, less, more
from jaxllm import launch
from jaxllm.report import figures
from jaxllm.report.run import at_most
from jaxllm.train import sweep

ARMS = (  # table, use of the pay, weight of the texts that are read again meanwhile
    (LECTURE, paid.GIVEN, 1.0), (BAND, paid.GIVEN, 1.0), (LECTURE, paid.IMITATED, 1.0), (LECTURE, paid.SHUFFLED, 1.0),
    (LECTURE, paid.GIVEN, 0.0),
)  # fmt: skip


def algebra():
    """What holds of the two tables without any model."""
    meet = [crossing(LECTURE[0], NOTHING), crossing(LECTURE[1], NOTHING), crossing(*LECTURE)]
    low, high = crossing(BAND[1], NOTHING), crossing(*BAND)
    inside = {Fraction(i, 840) for i in range(841) if low < Fraction(i, 840) < high}
    return [
        at_most("lecture's table: its three crossings, off 4/5", float(max(abs(p - Fraction(4, 5)) for p in meet)), 0),
        at_most("lecture's table: confidences, of 841, at which hedging is strictly best", len(hedging_pays(LECTURE)), 0),
        at_most("hedged wrong -1: hedging is best from, off 2/3", float(abs(low - Fraction(2, 3))), 0),
        at_most("hedged wrong -1: hedging is best to, off 6/7", float(abs(high - Fraction(6, 7))), 0),
        at_most("hedged wrong -1: confidences, of 841, that this band gets wrong", len(hedging_pays(BAND) ^ inside), 0),
    ]


def learn(c):
    """Curves {name: [arms, seeds, points, facts]} of all arms."""
    names = {"firsts": c.names, "lasts": c.names, "values": c.choices, "known": c.known, "unknown": c.unknown}
    model, grounds = lab.grounds(c, partial(paid.lessons, unknown=c.unknown_share), **names)
    seeds, hyper = sweep.grid(c.seeds, arm=np.arange(len(ARMS)))
    columns = zip(("table", "use", "rehearse"), zip(*ARMS, strict=True), strict=True)
    hyper = {name: jnp.asarray(np.array(column, float))[hyper["arm"]] for name, column in columns}
    tx, ask = optimizer(c.rl_lr, 2 * c.steps), partial(paid.ask, unknown=c.unknown_share)
    gains = partial(paid.advantages, model, c.kl_coef)
    step = answering.policy_step(model, ask, gains, tx, batch=c.batch_size, texts_batch=c.batch_size)
    data, look = {"ground": sweep.take(grounds, seeds)}, partial(paid.look, model)
    return fit_arms(c, tx, step, look, data, hyper, steps=c.steps, every=c.every)[1]


def summarise(c, curves):
    """{name: [seeds]} of what is claimed."""
    lecture, band, imitated, shuffled, alone = ({n: x[i, :, -1] for n, x in curves.items()} for i in range(len(ARMS)))
    first = {n: x[0, :, 0] for n, x in curves.items()}
    sure, unknown = first["warranted"], np.arange(first["pay"].shape[-1]) >= (c.known + 1) // 2
    between = (sure > 2 / 3) & (sure < 6 / 7)
    spread = lambda x: mean_where(x["answered"], sure >= 0.9) - mean_where(x["answered"], sure <= 0.5)  # noqa: E731
    crossings = lambda x: np.array([threshold(*row) for row in zip(x, lecture["answered"], strict=True)])  # noqa: E731
    constant = np.maximum(first["always_answer"].mean(axis=1), first["always_hedge"].mean(axis=1))
    return {
        "pay/rl": lecture["pay"].mean(axis=1), "pay/sft": first["pay"].mean(axis=1), "pay/constant": np.maximum(constant, 0),
        "pay/oracle": lecture["oracle"].mean(axis=1), "pay/shuffled": shuffled["pay"].mean(axis=1),
        "pay/alone": alone["pay"].mean(axis=1), "right/alone": mean_where(alone["right"], sure >= 0.9),
        "right/rl": mean_where(lecture["right"], sure >= 0.9),
        "threshold/model": crossings(first["confidence"]), "threshold/world": crossings(sure),
        "invented/sft": 1 - first["idk"][:, unknown].mean(axis=1), "invented/rl": 1 - lecture["idk"][:, unknown].mean(axis=1),
        "hedged/lecture": mean_where(lecture["hedged"], between), "hedged/band": mean_where(band["hedged"], between),
        "idk/sft": first["idk"][:, unknown].mean(axis=1), "idk/imitated": imitated["idk"][:, unknown].mean(axis=1),
        "spread/lecture": spread(lecture), "spread/shuffled": spread(shuffled),
        "calibration": np.array([np.corrcoef(*row)[0, 1] for row in zip(first["confidence"], sure, strict=True)]),
        "right/sure": mean_where(first["right"], sure >= 0.9), "answered/sure": mean_where(lecture["answered"], sure >= 0.9),
    }  # fmt: skip


def claims_of(m):
    """The claims on the trained policies, all on people who were in no question of the training."""
    return [
        more("pay after RL less pay after supervised tuning", m["pay/rl"] - m["pay/sft"], 0, "gate"),
        more("pay after RL less the best constant policy's", m["pay/rl"] - m["pay/constant"], 0),
        less("threshold of answering in the model's confidence, off 0.8", np.abs(m["threshold/model"] - 0.8), 0.1),
        less("threshold of answering in the confidence that the texts warrant, off 0.8", np.abs(m["threshold/world"] - 0.8), 0.1),
        more("pay after RL, with texts read again less without", m["pay/rl"] - m["pay/alone"], 0),
        less("unknown people: answered, hedged or not, after RL", m["invented/rl"], 0.05),
        more("hedged between 2/3 and 6/7, hedged wrong -1 less lecture's table", m["hedged/band"] - m["hedged/lecture"], 0.1),
        less("unknown people: 'I do not know' of positives only, less before", m["idk/imitated"] - m["idk/sft"], 0, "gate"),
        more("answered if sure less if unsure, lecture's table", m["spread/lecture"], 0.5),
        less("answered if sure less if unsure, shuffled pay (control)", m["spread/shuffled"], 0.2),
    ]


def findings_of(m, claims):
    """The paragraph: numbers first, then what did not come out."""
    x = {n: float(np.nanmean(v)) for n, v in m.items()}
    return (
        "By the lecture's numbers (5p - 4 answered, 2.5p - 2 hedged, 0 for 'I do not know') all cross at p = 0.8: hedging is "
        "never strictly best; with -1 for hedged and wrong it is best for 2/3 < p < 6/7. The world is synthetic: its texts "
        f"contradict each other. The tuned model's confidence correlates at {x['calibration']:.2f} with what they warrant; "
        f"{x['right/sure']:.0%} of its answers to facts at 0.9 and above are right. Pay on held-out people after RL "
        f"{x['pay/rl']:.3f}, after supervised tuning {x['pay/sft']:.2f}, best constant policy {x['pay/constant']:.3f}, knowing "
        f"all texts {x['pay/oracle']:.3f}. P(answer) crosses one half at {x['threshold/model']:.2f} of the model's confidence "
        f"before RL, at {x['threshold/world']:.2f} of the warranted one; {x['answered/sure']:.0%} of sure facts are answered. "
        f"Unknown people: answered {x['invented/sft']:.0%} of the time before, {x['invented/rl']:.1%} after. Inside the band "
        f"{x['hedged/band']:.0%} is hedged with the second table, {x['hedged/lecture']:.0%} with the lecture's. Imitating only "
        f"paid answers takes 'I do not know' on unknown people from {x['idk/sft']:.0%} to {x['idk/imitated']:.1%}: it is never "
        f"paid. Sure facts are answered {x['spread/lecture']:.2f} more often than unsure ones, with shuffled pay "
        f"{x['spread/shuffled']:.2f}. Texts are read again during RL: right answers to sure facts go to "
        f"{x['right/rl']:.0%}, without that to {x['right/alone']:.0%}, and pay to {x['pay/alone']:.3f}, for RL on some people "
        f"forgets others. RL is PPO's clipped loss with the batch's mean as baseline. Did not come out: {failed(claims)}."
    )


def figures_of(run, curves):
    """What is said against the confidence that the texts warrant, and the pay that the two tables promise."""
    edges, shown = np.linspace(0, 1, 8), {
        "tuned: answered": ("answered", 0, 0), "lecture: answered": ("answered", 0, -1), "lecture: hedged": ("hedged", 0, -1),
        "-1: answered": ("answered", 1, -1), "-1: hedged": ("hedged", 1, -1),
    }  # fmt: skip
    sure, lines = curves["warranted"][0, :, 0], {}
    bins = [(sure > a) & (sure <= b) for a, b in zip(edges, edges[1:], strict=False)]
    for label, (name, arm, point) in shown.items():
        y = np.stack([mean_where(curves[name][arm, :, point], chosen) for chosen in bins], axis=1)
        lines[label] = (np.tile((edges[1:] + edges[:-1]) / 2, (len(y), 1)), y)
    series, bands = along(lines)
    title, p = "What is said of people not trained on", np.linspace(0.5, 1, 51)
    run.figure("actions", figures.line_plot(series, title, "confidence that the texts warrant", "probability", bands=bands))
    rows = {"answer": LECTURE[0], "hedge": LECTURE[1], "hedge, wrong -1": BAND[1], "do not know": NOTHING}
    promised = {name: (p, p * float(row[0]) + (1 - p) * float(row[1])) for name, row in rows.items()}
    run.figure("pay", figures.line_plot(promised, "Expected pay", "confidence", "pay"))


def main(config, run):
    curves = learn(config)
    found = summarise(config, curves)
    claims = algebra() + claims_of(found)
    figures_of(run, curves)
    run.finish({n: float(np.nanmean(x)) for n, x in found.items()}, claims, findings=findings_of(found, claims))


if __name__ == "__main__":
    launch.run(main, "studies.calibrated_reward")
