"""Does a judge model's feedback replace gold labels? Zephyr's recipe, RLAIF, critique and revise, self-rewarding, weak to strong.

python -m experiments.studies.ai_feedback    (minutes on two cores; --config=configs/studies/ai_feedback.py:full elsewhere)
A simulated teacher rates strings 1 to 5 for four aspects (UltraFeedback's), with noise; a judge language model learns its
ratings and scores by its expected rating. dSFT: fine-tuning on demonstrations, half of them careless. dDPO: a small dSFT model
on the best of four models' strings against a random other. Controls: a judge taught shuffled ratings, and a random choice.
Strings have no prompts at CPU size: models so small do not learn in 400 steps to use words that a prompt names.
"""

from __future__ import annotations

import numpy as np

from experiments.studies.ai_feedback import arms, pool
from experiments.studies.ai_feedback.arms import RATERS
from experiments.studies.ai_feedback.pool import ARMS
from experiments.studies.lab.showing import banded, failed, less, more
from jaxllm import launch
from jaxllm.report import figures
from jaxllm.report.run import at_least, at_most


def main(c, run):
    labs = pool.sizes(c)
    data, ground = arms.prepare(labs, c, run)
    run.note(f"{c.seeds} seeds are ready: {c.pairs} pairs for each of {len(ARMS)} arms")
    dpo = arms.zephyr(labs, c, data)
    run.note("DPO is done")
    facts = {name: np.asarray(x, np.float64) for name, x in data["facts"].items()}
    report(c, run, facts, dpo, arms.self_rewarding(labs, c, data, ground))


def report(c, run, facts, dpo, rounds):
    """Metrics, figures, claims and the paragraph."""
    lines, bands = banded(dpo["step"][0, 0], {arm: dpo["win"][i] for i, arm in enumerate(ARMS)})
    run.figure("wins", figures.line_plot(lines, "Win rate of dDPO over dSFT, by gold", "step", bands=bands, width=640))
    curves = {who: rounds["win"][i] for i, who in enumerate(RATERS)} | {"its agreement with gold": rounds["agreement/pool"][0]}
    lines, bands = banded(range(c.rounds + 1), curves)
    run.figure("rounds", figures.line_plot(lines, "Self-rewarding", "round", "win rate, agreement", bands=bands, width=640))
    metrics = {name: float(x.mean()) for name, x in facts.items()}
    metrics |= {f"{arm}/{n}": float(x[i, :, -1].mean()) for n, x in dpo.items() if n != "step" for i, arm in enumerate(ARMS)}
    for n in ("gold", "win", "kl", "agreement/own", "agreement/pool"):
        metrics |= {
            f"{who}/round {r}/{n}": float(rounds[n][i, :, r].mean()) for i, who in enumerate(RATERS) for r in range(c.rounds + 1)
        }
    gap = metrics["judge/rubric"] - metrics["weak/rubric"]
    metrics["performance gap recovered"] = (metrics["student/rubric"] - metrics["weak/rubric"]) / gap if gap else float("nan")
    claims = claims_of(facts, dpo, rounds)
    run.finish(metrics, claims, findings=findings_of(metrics, claims))


def claims_of(facts, dpo, rounds):
    """The protocol's rules as findings, over seeds with intervals; the gates are arithmetic."""
    win, large = (dict(zip(ARMS, dpo[n][:, :, -1], strict=True)) for n in ("win", "win/large"))
    own, start = rounds["win"][0], max(np.abs(x["kl"][:, :, 0]).max() for x in (dpo, rounds))
    lost = rounds["agreement/pool"][0]
    return [
        at_most("KL before the first step, any run", float(start), 1e-3),
        at_least("least expected rating", float(facts["least rating"].min()), 1 - 1e-5),
        at_most("greatest expected rating", float(facts["greatest rating"].max()), 5 + 1e-5),
        at_least("least gain in rating of an accepted revision", float(facts["revisions/least gain"].min()), 0.0),
        more("Zephyr: win rate of dDPO over dSFT above one half", win["AI feedback"] - 0.5, 0.05),
        more("RLAIF: win rate, AI feedback less gold labels", win["AI feedback"] - win["gold labels"], -0.05),
        more("win rate of dDPO over dSFT of twice the width", large["AI feedback"], 0.5),
        more("win rate, a random other as rejected less the worst", win["AI feedback"] - win["best against worst"], 0.0),
        more("constitutional: win rate over dSFT above one half", win["constitutional"] - 0.5, 0.05),
        more("gold that accepted revisions gain over all revisions",
             facts["revisions/gold gain, accepted"] - facts["revisions/gold gain, all"], 0.0),
        less("negative control: win rate with a judge of shuffled ratings", win["shuffled judge"], 0.55),
        less("negative control: win rate with a random choice", win["random choice"], 0.55),
        more("how often the judge orders the pool's strings as gold", facts["judge/gold"], 0.6),
        more("the same, less a judge of shuffled ratings", facts["judge/gold"] - facts["shuffled/gold"], 0.0),
        more("self-rewarding: win rate after iteration 1 above one half", own[:, 1] - 0.5, 0.0),
        more("self-rewarding: win rate that iteration 3 adds to 1", own[:, -1] - own[:, 1], 0.0),
        less("agreement with gold that self-rewarding loses by iteration 3", lost[:, 0] - lost[:, -1], 0.05),
        more("win rate after 3 iterations, rating itself less the first judge", own[:, -1] - rounds["win"][1][:, -1], 0.0),
        less("negative control: win rate after 3 iterations on shuffled scores", rounds["win"][2][:, -1], 0.55),
        more("weak to strong: order as the rubric, student less supervisor", facts["student/rubric"] - facts["weak/rubric"], 0.0),
    ]  # fmt: skip


def findings_of(m, claims):
    """The paragraph: numbers first, then what did not come out, and what so few seeds do not decide."""
    open_ = [claim.name for claim in claims if claim.low is not None and claim.low < claim.bound < claim.high]
    each = lambda names, of, f=".2f": ", ".join(f"{name} {m[of.format(name)]:{f}}" for name in names)  # noqa: E731
    turns = lambda who, n: ", ".join(f"{m[f'{who}/round {r}/{n}']:.2f}" for r in range(4) if f"{who}/round {r}/{n}" in m)  # noqa: E731
    return (
        "The teacher and the writers of demonstrations are simulated; the constitution's rules are programs. Win rates by gold "
        f"of small dDPO policies over small dSFT, ties half: {each(ARMS, '{}/win')}; AI feedback over dSFT of twice the width, "
        f"which imitates the same demonstrations: {m['AI feedback/win/large']:.2f}. Gold in s.d. of the source, before: "
        f"{each(('small', 'large', 'judge'), 'gold/{}')}; after: {each(ARMS, '{}/gold')}. The pool's strings are ordered as gold "
        f"orders them by {each(('rubric', 'judge', 'student', 'weak', 'shuffled'), '{}/gold', '.1%')} (the rubric without "
        f"noise is the ceiling). Revisions: {m['revisions/accepted']:.0%} taken, gold {m['revisions/gold gain, accepted']:+.2f} "
        f"(all {m['revisions/gold gain, all']:+.2f}). Self-rewarding, rounds 0 to 3: win rate over the beginning "
        f"{turns(RATERS[0], 'win')} ({turns(RATERS[1], 'win')} with the first judge), agreement with gold "
        f"{turns(RATERS[0], 'agreement/pool')} on the pool and {turns(RATERS[0], 'agreement/own')} on its own strings. Weak to "
        f"strong: agreement with the rubric {each(('weak', 'student', 'judge'), '{}/rubric', '.1%')}, so the student recovers "
        f"{m['performance gap recovered']:.0%} of the gap. Did not come out: {failed(claims)}. "
        f"Undecided, since the interval holds the bound: {'; '.join(open_) or 'nothing'}."
    )


if __name__ == "__main__":
    launch.run(main, "studies.ai_feedback")
