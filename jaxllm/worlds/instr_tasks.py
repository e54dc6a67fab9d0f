"""Drawing tasks from the splits: by combination of arguments, by template and by family."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from jaxllm.core.types import UserError
from jaxllm.worlds import instr_families, instr_safety
from jaxllm.worlds.instr_families import Family
from jaxllm.worlds.instr_words import between, pick_weighted, seeded, share_of

SPLITS = ("train", "tune", "test", "template", "family")
MIXTURE = {"unsafe": 0.3, "lookalike": 0.2, "plain": 0.5}
FAMILIES = {
    "plain": instr_families.PLAIN,
    "unsafe": instr_safety.UNSAFE,
    "lookalike": instr_safety.LOOKALIKE,
}
HELD_FAMILIES = {
    "plain": instr_families.HELD_PLAIN,
    "unsafe": instr_safety.HELD_UNSAFE,
    "lookalike": instr_safety.HELD_LOOKALIKE,
}
WEIGHTS, HELD_WEIGHTS = (
    {kind: [family.weight for family in families] for kind, families in table.items()}
    for table in (FAMILIES, HELD_FAMILIES)
)
TUNE, TEST = 0.1, 0.1  # shares of the combinations


def bucket(combination: str) -> str:
    """The split a combination belongs to: 80 % train, 10 % tune, 10 % test, by sha256."""
    share = share_of("instr", combination)
    if share < TEST:
        return "test"
    return "tune" if share < TEST + TUNE else "train"


def _combination(family: Family, fields: dict) -> str:
    arguments = [fields["key"]] if "key" in fields else [str(value) for value in fields.values()]
    return "|".join([family.name, *arguments])


def _template(family: Family, split: str, rng: random.Random) -> int:
    trained = len(family.templates) - family.held
    if split == "template":
        return between(rng, trained, len(family.templates) - 1)
    return between(rng, 0, trained - 1)


def draw_task(rng: random.Random, split: str, kind: str) -> dict:
    """One task row of a split and kind; combinations of other splits are drawn again."""
    families, weights = (HELD_FAMILIES, HELD_WEIGHTS) if split == "family" else (FAMILIES, WEIGHTS)
    family = pick_weighted(rng, families[kind], weights[kind])
    wanted = {"template": "test"}.get(split, split)
    while True:
        fields, answer = family.draw(rng)
        combination = _combination(family, fields)
        if split == "family" or bucket(combination) == wanted:
            break
    index = _template(family, split, rng)
    return {
        "prompt": family.templates[index].format(**fields),
        "answer": answer,
        "kind": kind,
        "family": family.name,
        "template": index,
        "split": split,
        "combination": combination,
    }


def kind_shares(kinds: Sequence[str] | Mapping[str, float] | str | None) -> dict[str, float]:
    """The mixture of kinds: the default one, that restricted to the kinds named, or the shares given."""
    if kinds is None:
        return MIXTURE
    named = [kinds] if isinstance(kinds, str) else list(kinds)
    unknown = [kind for kind in named if kind not in MIXTURE]
    if unknown or not named:
        raise UserError(f"kinds={kinds!r}: choose among {', '.join(MIXTURE)}")
    return dict(kinds) if isinstance(kinds, Mapping) else {kind: MIXTURE[kind] for kind in named}


def tasks(split: str, n: int, *, seed: int, kinds=None) -> list[dict]:
    """`n` task rows {"prompt", "answer", "kind", "family", "template", "split", "combination"} of one split.

    train, tune, test: disjoint combinations of arguments (by sha256), training templates. template:
    combinations of test, held-out templates. family: held-out families. Evaluation splits repeat no prompt
    while fresh ones are found. kinds: None for 30 % unsafe, 20 % look-alike, 50 % plain; or the kinds to
    keep; or a mapping to their shares. UserError: unknown split or kind.
    """
    if split not in SPLITS:
        raise UserError(f"split={split!r}: choose among {', '.join(SPLITS)}")
    shares = kind_shares(kinds)
    return _draw(seeded("tasks", split, seed), split, n, shares)


def _draw(rng: random.Random, split: str, n: int, shares: dict[str, float]) -> list[dict]:
    rows, seen = [], set()
    for _ in range(n):
        kind = pick_weighted(rng, list(shares), list(shares.values()))
        row = draw_task(rng, split, kind)
        for _ in range(0 if split == "train" else 20):
            if row["prompt"] not in seen:
                break
            row = draw_task(rng, split, kind)
        seen.add(row["prompt"])
        rows.append(row)
    return rows


def pair_tasks(n: int, *, seed: int) -> list[dict]:
    """Prompts to collect preferences on: train combinations and templates, the mixture of tasks()."""
    return _draw(seeded("pair_tasks", seed), "train", n, MIXTURE)
