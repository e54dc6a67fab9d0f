"""Raw web-like documents for pretraining, in which a question is mostly not answered.

The lectures' reason for fine-tuning: on the web a question is followed by another question, by somebody
else's line or by chit-chat, so a model of such text does not answer. Questions are those of the train split.
Facts are stated for all arguments: knowledge comes from pretraining, a test question is new as a question.
Much is repeated, from which copying is learned.
"""

from __future__ import annotations

import random

from jaxllm.worlds import instr_words as words
from jaxllm.worlds.instr_labelers import ramble
from jaxllm.worlds.instr_safety import echo
from jaxllm.worlds.instr_tasks import draw_task
from jaxllm.worlds.instr_words import article, between, draw, pick, pick_weighted, seeded, share_of

ANSWERED = 0.2  # share of the questions that are answered, how-to titles (never) aside
CHAT = (
    "Thanks for reading!", "Same question here.", "I would like to know too.", "Any idea?", "Good question.",
    "Nobody knows.", "Please help.", "I asked this last week.", "Have a nice day!", "Wrong forum, sorry.",
    "Okay! Ask again in the morning.", "Of course! Who needs this?", "Well, I think it is late.",
    "I hope this helps you!", "Let me know if you need more.", "Sorry, I was not here.", "I can't see it.",
    "See you at the lake.", "Is this for school?", "Me too.",
)  # fmt: skip
Doc = tuple[str, int, int]  # text, questions in it, answered ones


def _user(rng: random.Random) -> str:
    return f"{pick(rng, words.NAMES).lower()}{between(rng, 1, 99)}"


def _question(rng: random.Random) -> tuple[str, str | None]:
    """A question of the train split and its answer, None where it stays unanswered."""
    if rng.random() < ANSWERED:
        kind = "plain" if rng.random() < 0.85 else "lookalike"
        task = draw_task(rng, "train", kind)
        return task["prompt"], ramble(rng, task["answer"]) if rng.random() < 0.2 else task["answer"]
    kind = pick_weighted(rng, ("plain", "unsafe", "lookalike"), (0.7, 0.15, 0.15))
    return draw_task(rng, "train", kind)["prompt"], None


def _forum(rng) -> Doc:
    question, answer = _question(rng)
    lines = [f"{_user(rng)}: {question}"]
    if answer is not None:
        return "\n".join([*lines, f"{_user(rng)}: {answer}"]), 1, 1
    if rng.random() < 0.5:
        lines += [f"{_user(rng)}: {pick(rng, CHAT)}" for _ in range(2)]
        return "\n".join(lines), 1, 0
    other, reply = _question(rng)
    lines += [f"{_user(rng)}: {other}"] + ([] if reply is None else [f"{_user(rng)}: {reply}"])
    return "\n".join(lines), 2, int(reply is not None)


def _exercises(rng) -> Doc:
    lines, answered = [f"Exercise {between(rng, 1, 30)}"], 0
    for number in (1, 2):
        question, answer = _question(rng)
        lines += [f"{number}. {question}"] + ([] if answer is None else [f"Answer: {answer}"])
        answered += answer is not None
    return "\n".join(lines), 2, answered


def _faq(rng) -> Doc:
    lines, answered = [], 0
    for _ in range(2):
        question, answer = _question(rng)
        lines += [f"Q: {question}"] + ([] if answer is None else [f"A: {answer}"])
        answered += answer is not None
    return "\n".join(lines), 2, answered


def _belongs(rng: random.Random) -> str:
    category = pick(rng, list(words.CATEGORIES))
    return f"{pick(rng, words.CATEGORIES[category])} is {article(category)}."


def _number_fact(rng: random.Random) -> str:
    a, b = between(rng, 1, 12), between(rng, 1, 12)
    more, before = draw(rng, range(1, 51), 2), between(rng, 1, 98)
    facts = (
        f"{a} plus {b} is {a + b}.",
        f"After {before} comes {before + 1}.",
        f"{max(more)} is larger than {min(more)}.",
    )
    return pick(rng, facts)


def _spelling(rng: random.Random) -> str:
    word = pick(rng, words.ANIMALS + words.COLOURS)
    return (
        f"{word} in capitals is {word.upper()}." if rng.random() < 0.6 else f"{word} begins with {word[0]}."
    )


def _opposites(rng: random.Random) -> str:
    word = pick(rng, words.ADJECTIVES)
    return f"The opposite of {word} is {words.OPPOSITE_OF[word]}."


def _facts(rng) -> Doc:
    return " ".join(pick(rng, (_belongs, _number_fact, _spelling, _opposites))(rng) for _ in range(4)), 0, 0


def _repetition(rng) -> Doc:
    """Words in random order that come back: the longer they are, the more copying is worth to a model."""
    items, people = draw(rng, words.WORDS, between(rng, 3, 7)), draw(rng, words.NAMES, 2)
    text = pick(rng, (", ", " ")).join(items)
    shapes = (
        f"{people[0]} said: {text}\n{people[1]} said: {text}",
        f"Shopping: {text}. Again: {text}.",
        f"{text}\n{text}\n{text}",
        f'"{text}", said {people[0]}. "{text}!" said {people[1]}.',
        f"We saw {' and '.join(items[:3])}. I like {' and '.join(items[:3])}.",
    )
    return pick(rng, shapes), 0, 0


def _story(rng) -> Doc:
    """Who has what and is where, said twice in another order."""
    people, things = draw(rng, words.NAMES, 2), draw(rng, words.THINGS, 2)
    places, colours = draw(rng, words.PLACES, 2), draw(rng, words.COLOURS, 2)
    shape = between(rng, 0, 2)
    first = [
        (f"The {t} is with {p}.", f"{p} is at the {q}.", f"The {t} is {c}.")[shape]
        for p, t, q, c in zip(people, things, places, colours, strict=True)
    ]
    again = [
        (f"I saw the {t} with {p}.", f"{p} likes the {q}.", f"I want the {c} {t}.")[shape]
        for p, t, q, c in zip(people, things, places, colours, strict=True)
    ]
    return " ".join(first + (again if rng.random() < 0.5 else again[::-1])), 0, 0


def _sequence(rng) -> Doc:
    if rng.random() < 0.5:
        start = between(rng, 1, 90)
        return ", ".join(str(start + i) for i in range(between(rng, 4, 8))), 0, 0
    items = sorted(draw(rng, words.ANIMALS + words.COLOURS, between(rng, 3, 6)))
    return f"From A to Z: {', '.join(items)}", 0, 0


def _howto(rng) -> Doc:
    """Titles of a how-to site and, rarely, the first line of one."""
    task = draw_task(rng, "train", pick(rng, ("unsafe", "lookalike", "lookalike")))
    if task["kind"] == "unsafe" or rng.random() < 0.7:
        other = draw_task(rng, "train", "lookalike")
        return f"Latest questions:\n{task['prompt']}\n{other['prompt']}", 2, 0
    verb, thing = task["combination"].split("|")[1:]
    return f"{echo(verb, f'the {thing}')} The {thing} is {pick(rng, words.ADJECTIVES)}.", 0, 0


def _chatter(rng) -> Doc:
    lines = [f"{_user(rng)}: {pick(rng, CHAT)}" for _ in range(3)]
    return "\n".join(lines), 0, 0


STYLES = {
    _forum: 6, _exercises: 3, _faq: 3, _facts: 2.5, _repetition: 9, _story: 4, _sequence: 1, _howto: 1.5,
    _chatter: 0.5,
}  # fmt: skip


def document_rows(n: int, *, seed: int) -> list[dict]:
    """`n` rows {"text", "style", "questions", "answered"}: documents, their questions, how many are
    answered."""
    rng, rows = seeded("documents", seed), []
    styles, weights = list(STYLES), list(STYLES.values())
    for _ in range(n):
        style = pick_weighted(rng, styles, weights)
        text, questions, answered = style(rng)
        rows.append({"text": text, "style": style.__name__[1:], "questions": questions, "answered": answered})
    return rows


def documents(n: int, *, seed: int) -> list[str]:
    """`n` raw web-like documents for pretraining, most of them shorter than 60 tokens: forum threads,
    exercise sheets and FAQ whose questions are answered in about 17 % of the cases, facts, repeated
    lists, little stories, sequences, how-to titles, chit-chat."""
    return [row["text"] for row in document_rows(n, seed=seed)]


def raw_prompt(task: dict) -> str:
    """The task's prompt as the opening of such a document, to score a base model on its own ground."""
    which, prompt = share_of("raw", task["prompt"]), task["prompt"]
    rng = seeded("raw", prompt)
    if which < 0.5:
        return f"{_user(rng)}: {prompt}\n"
    return f"Q: {prompt}\n" if which < 0.75 else f"Exercise {between(rng, 1, 30)}\n1. {prompt}\n"
