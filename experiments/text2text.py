"""Tasks as text to text: their rows, their mixture, and greedy answers to them. Shared by t5 and studies of it."""

from __future__ import annotations

import collections

import jax
import numpy as np

from experiments import common, reading
from jaxllm.core import sharding
from jaxllm.core.types import UserError
from jaxllm.data import denoise, pack
from jaxllm.generate import decode
from jaxllm.worlds import text2text


def packed(config, run, tokenizer, pairs, target_length, what):
    """Packed rows of pairs, with the usual line on them."""
    record, report = denoise.pack_pairs(pairs, config.data.length, target_length, start=tokenizer.specials["pad"])
    pack.check_report(report, config.data.path or what)
    common.print_report(run, what, report)
    return record


def task_row(row, where):
    """The row, when it is a pair of texts."""
    denoise.text_pair(row, where)
    return row


def tasks_of(config, run):
    """task -> (train pairs of texts, test pairs): rows of a file, a share of them held out, or the built-in tasks."""
    c = config.data
    if not c.path:
        test = text2text.mixture("test", seed=config.seed, sizes=dict.fromkeys(text2text.TASKS, c.test))
        found = {name: (rows, test[name]) for name, rows in text2text.mixture("train", seed=config.seed).items()}
    else:
        grouped = collections.defaultdict(list)
        for row in reading.checked(config, run, c.path, task_row):
            grouped[str(row.get("task") or "all")].append(row)
        split = {name: common.hold_out(rows, c.held_out, config.seed) for name, rows in grouped.items()}
        found = {name: (train, test[: c.test]) for name, (train, test) in split.items()}
    wanted = [name.strip() for name in c.tasks.split(",") if name.strip()] or list(found)
    if unknown := sorted(set(wanted) - set(found)):
        raise UserError(f"config.data.tasks: no task {unknown[0]!r}; there are {', '.join(found)}")
    if alone := [name for name in wanted if not found[name][0]]:
        raise UserError(f"{c.path}: task {alone[0]!r} has 1 row: it needs one to train on and one to test")
    return {name: tuple([denoise.text_pair(r, name) for r in rows] for rows in found[name]) for name in wanted}


def mixed(config, run, tasks):
    """As many training pairs as there are, drawn at the mixing rates."""
    trains = [train for train, _ in tasks.values()]
    sizes = [len(train) for train in trains]
    rates = denoise.mixing_rates(sizes, limit=config.data.limit, temperature=config.data.temperature)
    run.note("tasks: " + ", ".join(f"{name} {n:,} ({r:.0%})" for name, n, r in zip(tasks, sizes, rates, strict=True)))
    return [trains[t][i] for t, i in denoise.mix(sizes, rates, sum(sizes), config.seed)]


def answer(config, trained, pairs, mesh):
    """The greedy answers to inputs, config.batch_size at a time; the last batch is filled up."""
    tokenizer = denoise.with_sentinels(trained.tokenizer)
    record, _ = denoise.pad_pairs(pairs, config.data.length, config.data.target_length)
    starts = np.full((config.batch_size, 1), tokenizer.specials["pad"], np.int32)
    ones = np.ones(config.batch_size, np.int32)

    @jax.jit
    def greedy(params, inputs, prompts, lengths):
        return decode.generate(
            trained.model, params, prompts, lengths, jax.random.key(0), inputs=inputs, temperature=0.0,
            max_new_tokens=config.data.target_length, stop=(tokenizer.specials["eos"],),
        )  # fmt: skip

    texts = []
    for start in range(0, len(pairs), config.batch_size):
        index = np.minimum(np.arange(start, start + config.batch_size), len(pairs) - 1)
        batch = (common.take(record["inputs"], index), starts, ones)
        s = jax.device_get(greedy(trained.params["policy"], *sharding.put_batch(batch, mesh)))
        texts += [tokenizer.decode(t[1:end].tolist()) for t, end in zip(s.tokens, s.lengths - s.stopped, strict=True)]
    return texts[: len(pairs)]


def exact_matches(config, run, trained, tasks, mesh):
    """{metric: exact match} by task of the model, of the most frequent target and of copying the input, and the model's mean."""
    tokenizer = denoise.with_sentinels(trained.tokenizer)
    asked = [(name, *pair) for name, (_, test) in tasks.items() for pair in test]
    texts = answer(config, trained, [denoise.encode_pair(tokenizer, source, target) for _, source, target in asked], mesh)
    metrics = {}
    for name, (train, test) in tasks.items():
        got = [text for text, (task, *_) in zip(texts, asked, strict=True) if task == name]
        usual = collections.Counter(target for _, target in train).most_common(1)[0][0]
        copied = [source.removeprefix(f"{name}: ") for source, _ in test]
        guesses = {"exact_match": got, "usual_target": [usual] * len(test), "copied_input": copied}
        for what, texts_of in guesses.items():
            hits = [text.strip() == target.strip() for text, (_, target) in zip(texts_of, test, strict=True)]
            metrics[f"{what}/{name}"] = float(np.mean(hits))
        run.note(
            f"{name}: exact match {metrics[f'exact_match/{name}']:.2f} on {len(test)} (most frequent target "
            f"{metrics[f'usual_target/{name}']:.2f}, copying {metrics[f'copied_input/{name}']:.2f})"
        )
    return {"eval/exact_match": float(np.mean([metrics[f"exact_match/{name}"] for name in tasks])), **metrics}
