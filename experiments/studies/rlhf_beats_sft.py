"""Can a small model after RLHF beat a large one after supervised tuning? Over the noise of the demonstrations.

python -m experiments.studies.rlhf_beats_sft    (minutes on two cores; --config=configs/studies/rlhf_beats_sft.py:full elsewhere)
InstructGPT's comparison (arXiv 2203.02155) on a world where gold is known; demonstrators are simulated: a careful one hands in
the best of some strings of the source, a careless one the first. How many are careless is a knob. Prompts that name the good
words are for `full`: a reward model of CPU size did not learn to read them (55 % agreement with gold), and RLHF then lost.
The annotators of the comparisons are simulated too (Bradley-Terry on gold). Sizes differ in the policy's width alone.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.studies import lab
from experiments.studies.lab import demonstrations
from experiments.studies.lab.arms import fit_arms
from experiments.studies.lab.showing import banded, failed, less, more
from jaxllm import launch
from jaxllm.report import figures
from jaxllm.report.run import at_least
from jaxllm.train import sweep


def learn(c, run):
    """Gold of the policies {sft, rl: [widths, settings, seeds, looks]}, accuracy of reward models [seeds, 2], KL [w, s, s]."""
    labs = {w: lab.make(c.length, prompt=c.prompt, width=w, judge_width=c.judge_width) for w in c.widths}
    key = jax.random.key(c.seed)
    data = jax.jit(jax.vmap(partial(demonstrations.prepare, labs[c.widths[-1]], c)))(jax.random.split(key, c.seeds))
    seeds, hyper = sweep.grid(c.seeds, setting=np.arange(len(c.noise) + 1))
    hyper = {"noise": jnp.float32([*c.noise, c.control])[hyper["setting"]], "kl_coef": jnp.full(len(seeds), c.kl_coef),
             "judge": (hyper["setting"] == len(c.noise)).astype(int)}  # fmt: skip
    held = sweep.take(data, seeds)
    held["judge"] = jax.vmap(lambda j, i: jax.tree.map(lambda x: x[i], j))(held.pop("judges"), hyper["judge"])
    keys, found = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(len(seeds))), []
    for width, models in labs.items():
        held["ground"] = held["ground"].replace(
            reference=jax.jit(jax.vmap(partial(demonstrations.tuned, models, c)))(held, hyper, keys)
        )
        tx = lab.optimizer(c.rl_lr, 2 * c.steps)
        score = lambda d, record, models=models: lab.proxy(models, d["judge"], record)  # noqa: E731
        step = lab.policy_step(models, score, tx, batch=c.batch_size)
        lean = {"ground": held["ground"], "judge": held["judge"]}
        found.append(fit_arms(c, tx, step, partial(demonstrations.look, models, c), lean, hyper, steps=c.steps, every=c.steps)[1])
        run.note(f"width {width} is done")
    gold, kl = (np.stack([f[n] for f in found]) for n in ("gold", "kl"))
    return {"sft": gold[:, :, :, 0], "rl": gold[:, :, :, -1]}, np.asarray(data["right"]), kl[..., -1]


def wins(one, other):
    """The share of prompts on which one is better, ties counting half: [..., seeds] of [..., seeds, looks]."""
    return (one > other).mean(axis=-1) + 0.5 * (one == other).mean(axis=-1)


def claims_of(c, gold, right):
    """The claims; wins are over the largest policy after supervised tuning on the same demonstrations."""
    largest, levels = gold["sft"][-1:], len(c.noise)
    rl, same = wins(gold["rl"], largest), wins(gold["rl"], gold["sft"])
    noisy, small = levels - 1, max(0, min(1, len(c.widths) - 2))
    at = f"width {c.widths[small]}, noise {c.noise[-1]:g}"
    grows = np.diff(rl[:, noisy].mean(axis=-1))
    return [
        *(more(f"width {w}: wins of RLHF over SFT of the same size, noise {c.noise[-1]:g}", same[i, noisy], 0.5, "gate")
          for i, w in enumerate(c.widths)),
        more(f"{at}: wins of RLHF over the largest SFT", rl[small, noisy], 0.55),
        more(f"width {c.widths[0]}, noise {c.noise[-1]:g}: wins of RLHF over the largest SFT", rl[0, noisy], 0.55),
        at_least("least rise of these wins from one size to the next", float(grows.min(initial=1)), 0, kind="finding"),
        more(f"width {c.widths[small]}, noise {c.noise[0]:g}: wins of RLHF over the largest SFT", rl[small, 0], 0.55),
        more("wins that noise adds to the small RLHF policy", rl[small, noisy] - rl[small, 0], 0),
        less(f"width {c.widths[-1]}: wins of RL on a reward model of shuffled labels over SFT (control)", same[-1, levels], 0.55),
        more("accuracy of the reward models against gold", right[:, 0], 0.7),
    ]  # fmt: skip


def findings_of(c, gold, right, kl, claims):
    """The paragraph: numbers first, then what did not come out."""
    rl, levels = wins(gold["rl"], gold["sft"][-1:]).mean(axis=-1), len(c.noise)
    rows = "; ".join(
        f"noise {noise:g}: SFT {', '.join(f'{x:.2f}' for x in gold['sft'][:, i].mean(axis=(1, 2)))}, RLHF "
        f"{', '.join(f'{x:.2f}' for x in gold['rl'][:, i].mean(axis=(1, 2)))}, wins {', '.join(f'{x:.0%}' for x in rl[:, i])}"
        for i, noise in enumerate(c.noise)
    )
    return (
        "Demonstrators and annotators are simulated, and the noise of demonstrations is a knob: at 0 every demonstration is the "
        f"best of {c.best_of} strings, at 1 the first. Gold (s.d. of the source's strings) by width "
        f"{', '.join(map(str, c.widths))}, and how often RLHF beats the largest SFT policy of that noise: "
        f"{rows}. The reward models agree with gold on {right[:, 0].mean():.0%} of pairs, on shuffled labels "
        f"{right[:, 1].mean():.0%}, and RL on the latter ends at "
        f"{', '.join(f'{x:.2f}' for x in gold['rl'][:, levels].mean(axis=(1, 2)))}. KL to the tuned policy after RLHF is "
        f"{kl[:, :levels].mean():.1f} nats. A small policy wins by what comparisons know and demonstrations do not. RL "
        "is PPO's clipped loss with the batch's mean as the baseline, without the pretraining mix. "
        f"Did not come out: {failed(claims)}."
    )


def main(config, run):
    gold, right, kl = learn(config, run)
    claims, noise = claims_of(config, gold, right), list(config.noise)
    won = wins(gold["rl"], gold["sft"][-1:])[:, : len(noise)]
    lines = {f"RLHF, width {w}": won[i].T for i, w in enumerate(config.widths)}
    small = wins(gold["sft"][:1], gold["sft"][-1:])[0, : len(noise)]
    series, bands = banded(noise, lines | {f"SFT, width {config.widths[0]}": small.T})
    title = f"Wins over SFT at width {config.widths[-1]}"
    run.figure("wins", figures.line_plot(series, title, "share of careless demonstrations", "win rate", bands=bands))
    names = [*(f"noise {x:g}" for x in noise), "shuffled labels"]
    metrics = {
        f"{arm}/{w}/{name}": float(x[i, k].mean())
        for arm, x in gold.items() for i, w in enumerate(config.widths) for k, name in enumerate(names)
    }  # fmt: skip
    run.finish(metrics, claims, findings=findings_of(config, gold, right, kl, claims))


if __name__ == "__main__":
    launch.run(main, "studies.rlhf_beats_sft")
