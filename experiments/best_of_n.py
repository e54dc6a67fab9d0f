"""Best of n: n samples a prompt, the best by a verifier or a reward model, for every n at once without bias.

    python -m experiments.best_of_n --config.init=runs/sft
    python -m experiments.best_of_n --config.init=runs/sft --config.reward_model=runs/reward

Writes the best of all samples to best.jsonl, rows that experiments.sft reads (best-of-n distilled).
"""

from __future__ import annotations

from functools import partial

import jax
import numpy as np

from experiments import common, completions, verifiable
from jaxllm import launch
from jaxllm.core.types import UserError
from jaxllm.data import chat
from jaxllm.evals.passk import best_of_n, best_of_n_kl
from jaxllm.evals.stats import mean_interval
from jaxllm.generate.rewards import combine
from jaxllm.losses import reward
from jaxllm.models import heads
from jaxllm.report import figures
from jaxllm.report.run import at_least
from jaxllm.train.annotate import map_batches


def proxy_scores(config, base, judge, record):
    """[b] of a reward model on the completions' records."""
    scalars = partial(heads.scalars, heads.with_scalar_head(base.model))
    return map_batches(jax.jit(partial(reward.score, scalars)), judge.params["reward"], record, config.sample_batch)


def curves(proxy, gold, samples):
    """{n: (proxy, gold)} of the best of n by the proxy, n = 1, 2, 4, ..., samples; intervals over prompts [p, samples]."""
    ns = sorted({2**i for i in range(samples.bit_length()) if 2**i <= samples} | {samples})
    return {n: tuple(mean_interval(best_of_n(proxy, values, n)) for values in (proxy, gold)) for n in ns}


def plot(found, title):
    """The figure: score against n, with intervals, on a logarithmic axis."""
    x = [float(np.log2(n)) for n in found]
    sides = {name: [values[i] for values in found.values()] for i, name in enumerate(("what chooses", "what judges"))}
    lines = {name: (x, [v.mean for v in side]) for name, side in sides.items()}
    bands = {name: ([v.low for v in side], [v.high for v in side]) for name, side in sides.items()}
    return figures.line_plot(lines, title, "log2 n", "score of the best of n", bands=bands)


def write_best(run, tasks, texts, proxy):
    """best.jsonl: each prompt with its best completion."""
    best = proxy.argmax(axis=1)
    rows = [
        {"messages": [*chat.as_messages(prompt, "user", tasks.where), {"role": "assistant", "content": said[i]}], "score": s[i]}
        for prompt, said, s, i in zip(tasks.prompts, texts, proxy, best, strict=True)
    ]
    verifiable.write_rows(run.path("best.jsonl"), rows)


def draw_and_score(config, run):
    """(where it starts, tasks, texts [p, n], proxy, gold float [p, n]) of prompts whose completions all have scores."""
    tasks = verifiable.load_tasks(config.data.path, config.prompts, config.seed + 8, "test", verifiable.reader(config, run))
    functions, weights = verifiable.parse_rewards(config.rewards, tasks)
    order = np.random.default_rng(config.seed).permutation(len(tasks.rows))
    chosen, others = order[: config.prompts], order[config.prompts :]
    # a model that has to be trained first does not see the solutions of what it is judged on, where there are others
    start = verifiable.start_of(config, run, verifiable.some(tasks, others if len(others) else chosen))
    base = launch.load(start, default="sft")
    judge = launch.load(config.reward_model, "reward") if config.reward_model else None
    if judge is not None:
        common.same_tokenizer(base, judge)
    new = verifiable.completion_tokens(config, base.tokenizer, tasks)
    tasks, prompts = verifiable.prompt_columns(config, run, base, verifiable.some(tasks, chosen), new)
    options = {"max_new_tokens": new, "temperature": config.temperature, "int8": config.int8}
    draw = completions.drawer(base, prompts, config.samples, config.sample_batch, **options)
    done = draw(base.params["policy"], jax.random.key(config.seed))
    rows = [row for row in tasks.rows for _ in range(config.samples)]
    scores = verifiable.score_texts(functions, weights, rows, done.texts, done.ended, done.lengths)
    for line in combine.describe(scores):
        run.warn(line)
    gold = scores.values.astype(np.float64)
    proxy = gold if judge is None else np.asarray(proxy_scores(config, base, judge, done.record), np.float64)
    texts, proxy, gold = (x.reshape(-1, config.samples) for x in (np.array(done.texts, object), proxy, gold))
    use = np.isfinite(gold).all(axis=1) & np.isfinite(proxy).all(axis=1)
    if not use.any():
        raise UserError(f"{tasks.where}: every prompt has a completion without a reward: {'; '.join(scores.reasons.values())}")
    if not use.all():
        run.warn(f"{(~use).sum()} of {len(use)} prompts have a completion without a reward and are left out")
    return start, verifiable.some(tasks, np.flatnonzero(use)), texts[use], proxy[use], gold[use]


def main(config, run):
    verifiable.one_process()
    run.truncate(0)
    start, tasks, texts, proxy, gold = draw_and_score(config, run)
    found = curves(proxy, gold, config.samples)
    metrics = {"prompts": len(tasks.rows)}
    for n, (by, judged) in found.items():
        values = {"proxy": by.mean, "gold": judged.mean, "kl_bound": float(best_of_n_kl(n))}
        run.log(n, values)
        metrics |= {f"{name}/{n}": value for name, value in values.items()}
        run.note(f"best of {n}: chosen by {by}, judged {judged}, KL from the model at most {values['kl_bound']:.2f} nats")
    run.figure("best_of_n", plot(found, f"Best of n on {tasks.where}"))
    write_best(run, tasks, texts, proxy)
    gain = found[config.samples][0].mean - found[1][0].mean
    claims = [at_least("gain of the best of all in what chooses", gain, 0.0)]
    run.finish(metrics, claims, then=f"sft --config.init={start} --config.data.path={run.path('best.jsonl')}")


if __name__ == "__main__":
    launch.run(main, "best_of_n")
