"""Do fresh pairs from the latest policy beat one big offline set of as many labels, and does DPO's own reward go stale?

python -m experiments.studies.iterative_dpo    (minutes on two cores; --config=configs/studies/iterative_dpo.py:full elsewhere)
Six rounds of pairs from the policy of the moment, labelled by a simulated annotator (Bradley-Terry on gold), the reference kept
or reset to that policy; offline DPO on as many pairs of the reference's, as many steps or six times. Control: coin-flip labels.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.studies import lab
from experiments.studies.lab.arms import fit_arms
from experiments.studies.lab.showing import banded, failed, less, more
from jaxllm import launch
from jaxllm.losses import preference
from jaxllm.report import figures
from jaxllm.report.run import at_least, at_most
from jaxllm.train import sweep
from jaxllm.train.optim import adamw

NAMES = ("iterative, kept reference", "iterative, reset reference", "coin-flip labels", "offline", "offline, more passes")


def prepare(labs, c, key):
    """What a seed has: its reference, the offline pairs, and a reward model trained on them."""
    keys = jax.random.split(key, 3)
    g = lab.ground(labs, keys[0], steps=c.pretrain_steps, length=c.length)
    pairs = lab.pairs(labs, g, g.reference, keys[1], c.rounds * c.pairs, sharpness=c.sharpness)
    judge = lab.train_judge(labs, pairs, keys[2], trunk=g.reference, steps=c.judge_steps)
    return {"ground": g, "pairs": pairs, "judge": judge}


def one_round(labs, c, tx, online):
    """A step of the sweep: a round of DPO on pairs of the policy of the moment, or on the offline pairs."""
    update = lab.preference_step(labs, preference.dpo, tx, batch=c.batch_size)

    def step(state, data, hyper, key):
        (draw, walk), pairs = jax.random.split(key), data["pairs"]
        if online:
            g, policy = data["ground"], state.params["policy"]
            anchor = jax.tree.map(lambda a, b: jnp.where(hyper["reset"], a, b), policy, g.reference)
            pairs = lab.pairs(labs, g.replace(reference=anchor), policy, draw, c.pairs, sharpness=hyper["sharpness"])
        body = lambda s, k: update(s, {"pairs": pairs}, hyper, k)  # noqa: E731
        state, metrics = jax.lax.scan(body, state, jax.random.split(walk, c.steps))
        return state, {n: m.mean() for n, m in metrics.items()}

    return step


def look(labs, c, state, data, hyper, key):
    """Gold and KL, and how often the policy's implicit reward and a fixed reward model order two strings as gold does."""
    g, policy, found = data["ground"], state.params["policy"], {}
    for where, params, k in zip(("own", "reference"), (policy, g.reference), jax.random.split(key), strict=True):
        record = lab.sample(labs, g.world, params, k, 2 * c.test_pairs)
        ratio = lab.kl(labs, g.reference, record) if where == "own" else -lab.kl(labs, policy, record)  # log policy / reference
        worth = lab.gold(g, record)
        found |= {"gold": worth.mean(), "kl": ratio.mean()} if where == "own" else {}
        for name, score in {"implicit": ratio, "model": lab.raw_score(labs, data["judge"], record)}.items():
            margin, gap = score[::2] - score[1::2], worth[::2] - worth[1::2]
            right = jnp.where(margin == 0, 0.5, margin * gap > 0)
            found[f"{name}/{where}"] = jnp.mean(right, where=jnp.abs(gap) > 1e-3)  # equal strings have no order
            found[f"{name}/{where}/far"] = jnp.mean(right, where=jnp.abs(gap) > 1)
    return found


def train(labs, c, data, settings, online, rounds):
    """Curves {name: [settings, seeds, rounds + 1]} of all settings (rows of beta, reset, sharpness) at once."""
    seeds, grid = sweep.grid(c.seeds, row=np.arange(len(settings)))
    hyper = {n: jnp.asarray(x)[grid["row"]] for n, *x in zip(("beta", "reset", "sharpness"), *settings, strict=True)}
    tx = adamw(c.lr, b2=0.98, weight_decay=0.0)  # a constant rate: a prefix of a long run is the short run
    step, observe = one_round(labs, c, tx, online), partial(look, labs, c)
    return fit_arms(c, tx, step, observe, sweep.take(data, seeds), hyper, steps=rounds, every=1)[1]


def main(c, run):
    labs = lab.make(c.length, width=c.width, layers=c.layers)
    data = jax.jit(jax.vmap(partial(prepare, labs, c)))(jax.random.split(jax.random.key(c.seed), c.seeds))
    run.note(f"{c.seeds} seeds are ready: references, {c.rounds * c.pairs} offline pairs and reward models")
    kept, reset = ([(beta, on, c.sharpness) for beta in c.betas] for on in (False, True))
    fresh = train(labs, c, data, [*kept, *reset, (c.betas[0], False, 0.0)], True, c.rounds)
    offline = train(labs, c, data, kept, False, c.rounds * c.more_passes)
    n, whole, arms, betas = len(c.betas), c.rounds * c.more_passes + 1, {}, {}
    rows = [range(n), range(n, 2 * n), range(2 * n, 2 * n + 1), range(n), range(n)]
    for i, name in enumerate(NAMES):
        curves, points = (fresh, offline)[i > 2], slice(0, whole if i > 3 else c.rounds + 1)
        best = max(rows[i], key=curves["gold"][:, :, points][..., -1].mean(axis=1).__getitem__)  # beta, by gold at the end
        arms[name], betas[name] = {m: x[best][:, points] for m, x in curves.items()}, c.betas[best % n]
    report(c, run, arms, betas)


def report(c, run, arms, betas):
    """Metrics, claims, figures and the paragraph."""
    metrics = {f"{arm}/{n}": float(x[:, -1].mean()) for arm, curves in arms.items() for n, x in curves.items() if n != "step"}
    metrics |= {f"{arm}/beta": beta for arm, beta in betas.items()}
    lines, bands = banded(range(c.rounds + 1), {arm: arms[arm]["gold"] for arm in NAMES[:4]})
    run.figure(
        "gold", figures.line_plot(lines, "Gold reward, equal labels at the end", "round", "gold (s.d.)", bands=bands, width=640)
    )
    shown = {"iterative, own strings": (0, "own"), "offline, own": (3, "own"), "offline, the reference's": (3, "reference")}
    stale = {text: arms[NAMES[i]][f"implicit/{at}"][:, 1:] for text, (i, at) in shown.items()}  # before training it is 0
    lines, bands = banded(range(1, c.rounds + 1), stale)
    run.figure("stale", figures.line_plot(lines, "Implicit reward's order against gold's", "round", "accuracy", bands=bands))
    claims = claims_of(c, arms)
    run.finish(metrics, claims, findings=findings_of(metrics, claims))


def claims_of(c, arms):
    """The protocol's rules as findings, over seeds with intervals; the gate is arithmetic."""
    kept, reset, coin, offline, passes = ({n: x[:, -1] for n, x in arms[name].items()} for name in NAMES)
    at = min(3, c.rounds)
    ahead = [arms[name]["gold"][:, at] - arms[NAMES[3]]["gold"][:, at] for name in NAMES[:2]]
    errors = ahead[0].mean() / (ahead[0].std(ddof=1) / np.sqrt(c.seeds))
    stale, far = (offline[f"implicit/reference{which}"] - offline[f"implicit/own{which}"] for which in ("", "/far"))
    return [
        at_most("KL before the first round, any run", float(max(np.abs(x["kl"][:, 0]).max() for x in arms.values())), 1e-3),
        less("negative control: gold gained on coin-flip labels", coin["gold"] - arms[NAMES[2]]["gold"][:, 0], 0.2),
        more(f"gold at round {at}, iterative less offline", ahead[0], 0.0),
        at_least("the same, in standard errors", float(errors), 2.0, kind="finding"),
        more(f"gold at round {at}, iterative with reset less offline", ahead[1], 0.0),
        more("gold at the end, iterative less offline", kept["gold"] - offline["gold"], 0.0),
        more("gold at the end, iterative with reset less offline", reset["gold"] - offline["gold"], 0.0),
        more("gold at the end, iterative less offline with more passes", kept["gold"] - passes["gold"], 0.0),
        more("offline implicit accuracy, on the reference's strings less on its own", stale, 0.0),
        more("the same on strings more than one s.d. apart", far, 0.0),
        more("a fixed model's, on the reference's less on the iterative's", kept["model/reference"] - kept["model/own"], 0.0),
        more("implicit accuracy on own strings, iterative less offline", kept["implicit/own"] - offline["implicit/own"], 0.0),
    ]


def findings_of(m, claims):
    """The paragraph: numbers first, then what did not come out."""
    each = lambda name, f: "; ".join(f"{arm} {m[f'{arm}/{name}']:{f}}" for arm in NAMES)  # noqa: E731
    both = lambda arm, name: f"{m[f'{arm}/{name}/reference']:.2f} and {m[f'{arm}/{name}/own']:.2f}"  # noqa: E731
    return (
        f"The annotator is simulated. At the end, at each arm's best beta ({each('beta', 'g')}), gold in s.d. of the "
        f"reference's strings is: {each('gold', '.2f')}; KL to the first reference in nats: {each('kl', '.1f')}. How often DPO's "
        f"implicit reward orders two strings of the reference and two of the policy as gold does: offline "
        f"{both(NAMES[3], 'implicit')}, iterative {both(NAMES[0], 'implicit')}; a reward model trained once on the offline "
        f"pairs, on the reference's and the iterative policy's: {both(NAMES[0], 'model')}. A policy's own strings lie closer in "
        f"gold, which alone makes them harder to order. Did not come out: {failed(claims)}."
    )


if __name__ == "__main__":
    launch.run(main, "studies.iterative_dpo")
