"""Tasks whose answers can be checked: prompts, rewards by name, and a model to start from. Shared by GRPO and its neighbours."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import common, completions, reading
from jaxllm.core.types import UserError
from jaxllm.data import chat, problems
from jaxllm.generate.rewards import answers, code, combine, text
from jaxllm.generate.sandbox import runner
from jaxllm.train import processes
from jaxllm.worlds import instr

SECONDS = 10.0  # that one call of a user's reward function may take
CONTEXT = 512  # of a model that is trained on the file's own solutions


class Tasks(NamedTuple):
    """prompts [n] (text or messages); rows [n] for the reward functions (prompt, gold, ...); solutions [n], "" where unknown;
    places [n]: where each stands; where: all of them."""

    prompts: list[Any]
    rows: list[dict[str, Any]]
    solutions: list[str]
    places: list[str]
    where: str


def load_tasks(path: str, most: int, seed: int, split: str = "train", read: Callable = problems.read_problems) -> Tasks:
    """The problems of a file, as read(path) gives them, or `most` tasks of the instr world."""
    if not path:
        rows = instr.tasks(split, most, seed=seed)
        golds = [{"prompt": r["prompt"], "gold": r["answer"], "task": r} for r in rows]
        places = [f"the instr world, row {i + 1}" for i in range(most)]
        return Tasks([r["prompt"] for r in rows], golds, [""] * most, places, "the instr world")
    found = read(path)
    rows = [{**p.row, "prompt": p.prompt[-1]["content"], "gold": p.gold} for p in found]
    return Tasks([p.prompt for p in found], rows, [p.solution for p in found], [p.where for p in found], str(path))


def some(tasks: Tasks, index: Any) -> Tasks:
    """The tasks of an index."""
    return Tasks(*([column[i] for i in index] for column in tasks[:4]), tasks.where)


def reader(config: Any, run: Any) -> Callable[[str], list[problems.Problem]]:
    """read(path) -> problems, bad rows treated as config.data.on_error says."""
    return lambda path: reading.checked(config, run, path, problems.problem)


def split_tasks(config: Any, run: Any, most: int, held_out: int) -> tuple[Tasks, Tasks]:
    """(train, held out): of a file a tenth, at most `held_out` rows; of the instr world its test split."""
    train = load_tasks(config.data.path, most, config.seed + 7, read=reader(config, run))
    if not config.data.path:
        return train, load_tasks("", held_out, config.seed + 8, "test")
    order = np.random.default_rng(config.seed).permutation(len(train.prompts))
    n = min(held_out, max(1, len(order) // 10))
    return some(train, order[n:]), some(train, order[:n])


# ---- rewards by name

NAMES = {
    "numeric": "the final number is the gold one", "exact": "the answer is the gold text", "gold": "the instr world's own",
    "readable": "there is a final number",
    "abstention": "the calibrated table on the final number", "format:PATTERN": "all of it matches", "ended": "ended by itself",
    "code": "a program that passes the row's tests; code:TIER of the sandbox",
    "length:TOKENS": "1 at this length", "repetition": "-1 where all repeats", "FILE.py:NAME": "a function of a row",
}  # fmt: skip


def parse_rewards(spec: str, tasks: Tasks) -> tuple[dict[str, combine.Reward], dict[str, float]]:
    """({name: function}, {name: weight}) of "numeric + 0.2*format:<b>.* + my.py:reward"; "" is the verifier of the tasks.

    UserError: unknown names, the same one twice, gold answers that the reward cannot read, a file that does not load.
    """
    functions: dict[str, combine.Reward] = {}
    weights: dict[str, float] = {}
    for part in (spec or default_reward(tasks)).split(" + "):
        weight, text_ = re.fullmatch(r"\s*(?:(-?[0-9.]+)\s*\*)?\s*(.*?)\s*", part, re.DOTALL).groups()
        name, function = _reward(text_, tasks)
        if name in functions:
            raise UserError(f"config.rewards={spec!r} has {name!r} twice: give it once, with a weight")
        try:
            functions[name], weights[name] = function, float(weight or 1.0)
        except ValueError:
            raise UserError(f"config.rewards={spec!r}: {weight!r} is no weight") from None
    if "numeric" in functions and "readable" not in functions:  # wrong and unreadable answers are told apart in the metrics
        functions["readable"], weights["readable"] = _readable, 0.0
    combine.check(functions)
    return functions, weights


def default_reward(tasks: Tasks) -> str:
    """gold in the instr world; code where every row has tests, numeric where every gold answer is a number, else exact."""
    if tasks.rows and "task" in tasks.rows[0]:
        return "gold"
    if all(r.get("tests") for r in tasks.rows):
        return "code"
    return "numeric" if all(answers.gold_number(r["gold"]) is not None for r in tasks.rows) else "exact"


def _reward(text_: str, tasks: Tasks) -> tuple[str, combine.Reward]:
    """(a short name for metrics, the function) of one name."""
    name, _, argument = text_.partition(":")
    if name == "gold" and not argument:
        return name, _instr(tasks, "gold")
    if name == "code":
        return name, _code(tasks, argument)
    if name == "exact":
        _check_answers(tasks)
        world = bool(tasks.rows) and "task" in tasks.rows[0]
        return name, _instr(tasks, "exact") if world else lambda r: float(answers.exact_match(r["completion"], r["gold"]))
    if name == "readable" and not argument:
        return name, _readable
    if name in ("numeric", "abstention"):
        _check_numbers(tasks, name)
        table = {"numeric": _numeric, "abstention": _abstention}
        return name, table[name]
    if name == "format" and argument:
        # a user's pattern may take for ever: it runs in a worker
        return name, combine.External("jaxllm.generate.rewards.text", "format_row", {"pattern": argument})
    if name == "length" and argument.isdigit():
        return name, lambda r: text.length_reward(r["length"], int(argument))
    if name in ("repetition", "ended") and not argument:
        table = {"repetition": lambda r: text.repetition_penalty(r["completion"]), "ended": lambda r: float(r["ended"])}
        return name, table[name]
    if name.endswith(".py") and argument:
        return argument, combine.External(name, argument)
    listed = "; ".join(f"{n} ({about})" for n, about in NAMES.items())
    raise UserError(f"config.rewards: {text_!r} is no reward; there are {listed}")


def _numeric(row: dict) -> float:
    return float(answers.numeric_match(row["completion"], row["gold"]))


def _readable(row: dict) -> float:
    return float(answers.final_number(row["completion"]) is not None)


def _abstention(row: dict) -> float:
    return text.abstention(row["completion"], row["gold"], correct=answers.numeric_match)


def _instr(tasks: Tasks, key: str) -> combine.Reward:
    if not tasks.rows or "task" not in tasks.rows[0]:
        raise UserError(f"config.rewards={key!r} is the instr world's own: for {tasks.where} use numeric or exact")
    return lambda row: float(instr.score(row["task"], row["completion"], row["ended"])[key])


def _code(tasks: Tasks, tier: str) -> combine.Reward:
    """Programs in a tier of the sandbox; "unsafe_local" is limits alone."""
    for row, place in zip(tasks.rows, tasks.places, strict=True):
        code.check_tests(row, place)
    local = tier == "unsafe_local"
    return code.reward(runner.make("rlimits" if local else tier or "auto", unsafe_local=local))


def _check_answers(tasks: Tasks) -> None:
    for row, place in zip(tasks.rows, tasks.places, strict=True):
        if not row["gold"] and row.get("tests"):
            raise UserError(f"{place} has tests and no answer, as 'exact' needs: use code")


def _check_numbers(tasks: Tasks, name: str) -> None:
    for row, place in zip(tasks.rows, tasks.places, strict=True):
        if answers.gold_number(row["gold"]) is None:
            shown = row["gold"][:40]
            raise UserError(f"{place}: the answer {shown!r} is no number, as {name!r} needs: use exact")


def score_texts(functions: Any, weights: Any, rows: list[dict], texts: list[str], ended: Any, lengths: Any) -> combine.Scores:
    """Scores of completions of `rows`, each with its text, whether it ended by itself, and its length in tokens.

    Of several processes the first one scores for all: a function that times out on one machine may not on another.
    """
    full = [
        {**row, "completion": completion, "ended": bool(end), "length": int(length)}
        for row, completion, end, length in zip(rows, texts, ended, lengths, strict=True)
    ]

    def scored() -> list[Any]:
        s = combine.run(functions, full, seconds=SECONDS, weights=weights)
        columns = {n: c.tolist() for n, c in s.columns.items()}
        return [s.values.tolist(), s.valid.tolist(), s.failures, columns, s.reasons, s.counts]

    values, valid, failures, columns, reasons, counts = processes.from_first(scored)
    columns = {name: np.array(column, np.float32) for name, column in columns.items()}
    return combine.Scores(np.array(values, np.float32), np.array(valid, bool), failures, columns, reasons, counts)


# ---- where to start, and prompts as tokens


def start_of(config: Any, run: Any, tasks: Tasks) -> str:
    """The run to start from: config.init; else a model of CPU size trained on the file's own solutions; else need("sft")."""
    if config.init or not any(tasks.solutions):
        return common.need("sft", config.init, config, run)
    run.note(f"no run given: pretraining and fine-tuning one of CPU size on the solutions of {tasks.where}")
    pairs = [(p, s) for p, s in zip(tasks.prompts, tasks.solutions, strict=True) if s]
    said = [chat.as_messages(p, "user", tasks.where) for p, _ in pairs]
    documents = [{"text": m[-1]["content"] + "\n" + s} for m, (_, s) in zip(said, pairs, strict=True)]
    conversations = [{"messages": [*m, {"role": "assistant", "content": s}]} for m, (_, s) in zip(said, pairs, strict=True)]
    size = {"data.length": CONTEXT // 2, "batch_size": 8, "steps": 300, "eval_every": 0}
    base = common.need(
        "pretrain", "", config, run,
        **{"data.path": write_rows(run.path("data", "text.jsonl"), documents), "model.max_length": CONTEXT, **size},
    )  # fmt: skip
    rows = write_rows(run.path("data", "sft.jsonl"), conversations)
    return common.need("sft", "", config, run, init=base, **{"data.path": rows, **size, "optim.lr": 1e-3})


def write_rows(path: Any, rows: list[dict]) -> str:
    """Rows as a .jsonl file."""
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    processes.first_only(lambda: path.write_text(lines, encoding="utf-8"))
    return str(path)


def completion_tokens(config: Any, tokenizer: Any, tasks: Tasks) -> int:
    """config.max_new_tokens; 0: 36 in the instr world, else what 95 % of (500) solutions fit in, 128 without solutions."""
    if config.max_new_tokens:
        return config.max_new_tokens
    if not any(tasks.solutions):
        return 128 if config.data.path else 36
    lengths = [len(tokenizer.encode(s)) + 1 for s in tasks.solutions[:500] if s]
    return int(np.ceil(np.percentile(lengths, 95) / 4) * 4)


def prompt_columns(config: Any, run: Any, loaded: Any, tasks: Tasks, new: int) -> tuple[Tasks, dict[str, np.ndarray]]:
    """(tasks, their prompts {tokens, lengths}) of at most config.max_prompt tokens (0: what the context leaves beside `new`).

    Longer ones are left out, and counted. UserError when all are.
    """
    context = loaded.model.config.max_length
    if new >= context:
        raise UserError(
            f"config.max_new_tokens={config.max_new_tokens}: completions of {new} tokens leave no room for a prompt in a context "
            f"of {context}: give less than {context}"
        )
    limit = config.max_prompt or context - new
    common.check_length(loaded.model, limit + new, "config.max_prompt + config.max_new_tokens")
    ids = [chat.prompt_ids(loaded.tokenizer, p) for p in tasks.prompts]
    keep = [i for i, x in enumerate(ids) if len(x) <= limit]
    if not keep:
        fewest = min(map(len, ids), default=0)
        raise UserError(f"{tasks.where}: no prompt has up to {limit} tokens (the shortest has {fewest}): raise config.max_prompt")
    out = f", {len(ids) - len(keep)} with more than {limit} left out" if len(keep) < len(ids) else ""
    ids = [ids[i] for i in keep]
    longest = max(map(len, ids))
    run.note(f"{tasks.where}: {len(ids):,} prompts of up to {longest} tokens{out}")
    return some(tasks, keep), completions.prompt_columns(loaded.tokenizer, ids, longest)


def decode(tokenizer: Any, samples: Any) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(texts without the end token, ended bool [b], lengths int [b] in tokens with it) of Samples."""
    tokens, begin, end, stopped = processes.on_host((samples.tokens, samples.prompt_lengths, samples.lengths, samples.stopped))
    texts = [tokenizer.decode(t[a:b].tolist()) for t, a, b in zip(tokens, begin, end - stopped, strict=True)]
    return texts, stopped, end - begin


def one_process() -> None:
    """UserError of an experiment that makes its own data by sampling, which several processes would each do."""
    if jax.process_count() > 1:
        raise UserError(
            f"this experiment samples its own data in one process, there are {jax.process_count()}: run it on one host"
        )
