"""The plain instructions: families of questions with one known answer, over words, lists, numbers and
passages.

A family draws its arguments (the *combination*, which the splits are made of), says in templates how it is
asked, and computes the answer. Templates paraphrase with the same key words; the last ones are held out.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from jaxllm.worlds import instr_words as words
from jaxllm.worlds.instr_words import between, draw, pick

# The fields of a template and the answer. The fields are the combination, unless there is one named "key".
Drawn = tuple[dict[str, object], str]


@dataclass(frozen=True)
class Family:
    """Templates are str.format strings over the drawn fields; the last `held` of them are held out."""

    name: str
    weight: float
    draw: Callable[[random.Random], Drawn]
    templates: tuple[str, ...]
    held: int = 1
    kind: str = "plain"


def unordered(a: object, b: object) -> str:
    """The combination of two arguments whose order does not matter: both orders stand in one split."""
    return "|".join(sorted((str(a), str(b))))


def listed(items: list[str]) -> str:
    """The way lists are written in this world."""
    return ", ".join(items)


def _copy(rng):
    text = " ".join(draw(rng, words.WORDS, between(rng, 1, 2)))
    return {"x": text}, text


def _quote(rng):
    fields, text = _copy(rng)
    return fields, f'"{text}"'


def _repeat(rng):
    word, times = pick(rng, words.WORDS), between(rng, 2, 3)
    return {"w": word, "k": {2: "twice", 3: "three times"}[times]}, " ".join([word] * times)


def _nth(index: int):
    def draw_nth(rng):
        items = draw(rng, words.NOUNS, between(rng, 3, 4))
        return {"x": listed(items)}, items[index]

    return draw_nth


def _after(rng):
    items = draw(rng, words.NOUNS, between(rng, 3, 4))
    index = between(rng, 0, len(items) - 2)
    return {"w": items[index], "x": listed(items)}, items[index + 1]


def _member(rng):
    items = draw(rng, words.NOUNS, 4)
    listed_word = rng.random() < 0.5
    word = items[between(rng, 0, 2)] if listed_word else items[3]
    return {"w": word, "x": listed(items[:3])}, "yes" if listed_word else "no"


def _count(rng):
    items = draw(rng, words.NOUNS, between(rng, 2, 5))
    return {"x": listed(items)}, str(len(items))


def _remove(rng):
    items = draw(rng, words.NOUNS, 3)
    out = pick(rng, items)
    return {"w": out, "x": listed(items)}, listed([item for item in items if item != out])


def _replace(rng):
    items = draw(rng, words.NOUNS, 4)
    place = between(rng, 0, 2)
    replaced = [items[3] if i == place else item for i, item in enumerate(items[:3])]
    return {"w": items[place], "v": items[3], "x": " ".join(items[:3])}, " ".join(replaced)


def _join(rng):
    items = draw(rng, words.NOUNS, 2)
    return {"x": listed(items)}, " and ".join(items)


def _swap(rng):
    items = draw(rng, words.NOUNS, 2)
    return {"x": " ".join(items)}, " ".join(items[::-1])


def _reverse(rng):
    items = draw(rng, words.NOUNS, between(rng, 2, 3))
    return {"x": listed(items)}, listed(items[::-1])


def _sort(rng):
    items = draw(rng, words.ANIMALS + words.COLOURS, 2)
    return {"x": listed(items), "key": unordered(*items)}, listed(sorted(items))


def _upper(rng):
    text = " ".join(draw(rng, words.ANIMALS + words.COLOURS, 2))
    return {"x": text}, text.upper()


def _letters(rng):
    items = draw(rng, words.ANIMALS + words.COLOURS, 2)
    return {"x": listed(items)}, listed([item[0] for item in items])


def _same(rng):
    first, second = draw(rng, words.NOUNS, 2)
    equal = rng.random() < 0.5
    return {"x": f"{first}, {first if equal else second}"}, "yes" if equal else "no"


def _opposite(rng):
    items = draw(rng, words.ADJECTIVES, 2)
    return {"x": " and ".join(items)}, " and ".join(words.OPPOSITE_OF[item] for item in items)


def _category(rng):
    names = draw(rng, list(words.CATEGORIES), 3)
    items = [pick(rng, words.CATEGORIES[name]) for name in names]
    index = between(rng, 0, 2)
    return {"c": words.article(names[index]), "x": listed(items)}, items[index]


def _place(rng):
    people, places = draw(rng, words.NAMES, 2), draw(rng, words.PLACES, 2)
    index = between(rng, 0, 1)
    passage = " ".join(f"{p} is at the {q}." for p, q in zip(people, places, strict=True))
    return {"x": passage, "w": people[index]}, places[index]


def _who(rng):
    people, things = draw(rng, words.NAMES, 2), draw(rng, words.THINGS, 2)
    index = between(rng, 0, 1)
    passage = " ".join(f"The {q} is with {p}." for p, q in zip(people, things, strict=True))
    return {"x": passage, "w": things[index]}, people[index]


def _colour(rng):
    things, colours = draw(rng, words.THINGS, 2), draw(rng, words.COLOURS, 2)
    index = between(rng, 0, 1)
    passage = " ".join(f"The {p} is {q}." for p, q in zip(things, colours, strict=True))
    return {"x": passage, "w": things[index]}, colours[index]


def _owns(rng):
    person, (thing, other) = pick(rng, words.NAMES), draw(rng, words.THINGS, 2)
    owns = rng.random() < 0.5
    fields = {"x": f"{person} has a {thing}.", "p": person, "w": thing if owns else other}
    return fields, "yes" if owns else "no"


def _add(rng):
    a, b = between(rng, 1, 12), between(rng, 1, 12)
    return {"a": a, "b": b, "key": unordered(a, b)}, str(a + b)


def _next(rng):
    a = between(rng, 1, 98)
    return {"a": a}, str(a + 1)


def _larger(rng):
    a, b = draw(rng, range(1, 51), 2)
    return {"a": a, "b": b, "key": unordered(a, b)}, str(max(a, b))


def _more(rng):
    a, b = draw(rng, range(1, 51), 2)
    return {"a": a, "b": b, "key": unordered(a, b)}, "yes" if a > b else "no"


# fmt: off
LISTS = (
    Family("copy", 7, _copy, (
        "Say: {x}", "Copy this: {x}", "Repeat after me: {x}", "Write these words: {x}",
        "Please copy: {x}")),
    Family("first", 9, _nth(0), (
        "What is the first word of: {x}?", "First word of {x}?", "Give me the first of: {x}",
        "Tell me the first word in: {x}", "Which word is first in: {x}?")),
    Family("last", 9, _nth(-1), (
        "What is the last word of: {x}?", "Last word of {x}?", "Give me the last of: {x}",
        "Tell me the last word in: {x}", "Which word is last in: {x}?")),
    Family("second", 5, _nth(1), (
        "What is the second word of: {x}?", "Second word of {x}?", "Give me the second of: {x}",
        "Tell me the second word in: {x}", "Which word is second in: {x}?")),
    Family("after", 4, _after, (
        "What comes after {w} in: {x}?", "Which word is after {w} in: {x}?",
        "Give me the word after {w}: {x}", "Tell me what is after {w} in: {x}",
        "In this list, what is after {w}: {x}?")),
    Family("member", 6, _member, (
        "Is {w} in the list: {x}?", "Yes or no, is {w} in: {x}?", "Can you see {w} in: {x}?",
        "Does this list have {w}: {x}?", "Is there {w} in: {x}?")),
    Family("count", 5, _count, (
        "How many words are in: {x}?", "Count the words: {x}", "How many are these: {x}?",
        "Tell me how many words: {x}", "How many words do you see: {x}?")),
    Family("remove", 2, _remove, (
        "Remove {w} from: {x}", "Take {w} out of: {x}", "Write this without {w}: {x}",
        "Drop {w} from: {x}", "Please remove {w}: {x}")),
    Family("replace", 1.5, _replace, (
        "Change {w} to {v} in: {x}", "Put {v} for {w} in: {x}", "Replace {w} with {v}: {x}",
        "Use {v}, not {w}: {x}", "Please change {w} to {v}: {x}")),
    Family("join", 6, _join, (
        "Join with and: {x}", "Put and between: {x}", "Use and to join: {x}", "Write with and: {x}",
        "Please join with and: {x}")),
    Family("reverse", 2, _reverse, (
        "Reverse the list: {x}", "Write backwards: {x}", "Turn around: {x}",
        "Give in reverse order: {x}", "Please reverse: {x}")),
    Family("sort", 2, _sort, (
        "Sort by letter: {x}", "Sort from A to Z: {x}", "Put in A to Z order: {x}",
        "Order by letter: {x}", "Please sort: {x}")),
)
OTHERS = (
    Family("repeat", 7, _repeat, (
        "Say {w} {k}.", "Write {w} {k}.", "Repeat {w} {k}.", "I want to read {w} {k}.",
        "Please write {w} {k}.")),
    Family("upper", 2.5, _upper, (
        "Write in capitals: {x}", "Use capitals: {x}", "Say in capitals: {x}",
        "Put in capital letters: {x}", "Please write in capitals: {x}")),
    Family("letters", 1.5, _letters, (
        "What are the first letters of: {x}?", "First letters of {x}?", "Give the first letters: {x}",
        "Write the first letters of: {x}", "Which letters are first in: {x}?")),
    Family("opposite", 1.5, _opposite, (
        "What are the opposites of {x}?", "Opposites of {x}?", "Give me the opposites: {x}",
        "Write the opposites of {x}.", "Tell me the opposites of {x}.")),
    Family("category", 5, _category, (
        "Which one is {c}: {x}?", "Find {c} in: {x}", "Which word is {c}: {x}?",
        "Give me {c} from: {x}", "Which of these is {c}: {x}?")),
    Family("place", 7, _place, (
        "{x} Where is {w}?", "{x} Tell me where {w} is.", "Where is {w}? {x}", "{x} Say where {w} is.",
        "Read this: {x} Where is {w}?")),
    Family("who", 6, _who, (
        "{x} Who has the {w}?", "{x} Tell me who has the {w}.", "Who has the {w}? {x}",
        "{x} Say who has the {w}.", "Read this: {x} Who has the {w}?")),
    Family("colour", 7, _colour, (
        "{x} What colour is the {w}?", "{x} Tell me the colour of the {w}.",
        "What colour is the {w}? {x}", "{x} Say the colour of the {w}.",
        "Read this: {x} What colour is the {w}?")),
    Family("owns", 4, _owns, (
        "{x} Does {p} have a {w}?", "{x} Yes or no, has {p} a {w}?", "Does {p} have a {w}? {x}",
        "{x} Is it true that {p} has a {w}?", "Read this: {x} Does {p} have a {w}?")),
    Family("add", 1.5, _add, (
        "What is {a} plus {b}?", "Add {a} and {b}.", "{a} plus {b} is what?", "Give me {a} plus {b}.",
        "How much is {a} plus {b}?")),
    Family("next", 2, _next, (
        "What number comes after {a}?", "Next number after {a}?", "Give me the number after {a}.",
        "Which number is after {a}?", "Tell me the number after {a}.")),
    Family("larger", 2, _larger, (
        "Which is larger, {a} or {b}?", "Larger number: {a} or {b}?",
        "Tell me the larger of {a} and {b}.", "Give the larger one: {a}, {b}",
        "What is the larger of {a} and {b}?")),
    Family("more", 2, _more, (
        "Is {a} more than {b}?", "Yes or no, is {a} more than {b}?", "Tell me if {a} is more than {b}.",
        "Is it true that {a} is more than {b}?", "Would you say {a} is more than {b}?")),
)
PLAIN = LISTS + OTHERS
HELD_PLAIN = (  # families whose instruction never occurs in training
    Family("third", 1, _nth(2), (
        "What is the third word of: {x}?", "Give me the third of: {x}", "Third word of {x}?",
        "Tell me the third word in: {x}"), 0),
    Family("swap", 1, _swap, (
        "Swap the words: {x}", "Swap these two: {x}", "Write swapped: {x}", "Please swap: {x}"), 0),
    Family("quote", 1, _quote, (
        "Put quotes around: {x}", "Write in quotes: {x}", "Say in quotes: {x}", "Quote this: {x}"), 0),
    Family("same", 1, _same, (
        "Are these the same: {x}?", "Is this the same word: {x}?", "Same word or not: {x}?",
        "Yes or no, the same: {x}?"), 0),
)
# fmt: on
