"""An independent solver of the plain instructions: it reads the prompt as text, never the drawn arguments."""

import re

# word -> opposite, written out by hand and not taken from the world
PAIRS = (
    "hot cold,big small,old new,fast slow,day night,good bad,up down,left right,wet dry,hard soft,high low,"
    "early late,long short,dark light,full empty,rich poor,near far,loud quiet,thick thin,happy sad"
)
OPPOSITE = {}
for left, right in (pair.split() for pair in PAIRS.split(",")):
    OPPOSITE[left], OPPOSITE[right] = right, left
KINDS = {
    "an animal": "cat dog cow pig hen fox bear lion wolf goat duck horse mouse sheep frog fish",
    "a colour": "red blue green black white pink brown grey yellow purple",
    "a food": "apple bread cake rice milk soup egg corn tea salt bean pear lemon honey",
    "a place": "park school shop farm beach zoo lake bank river hotel",
}


def _items(prompt):
    """The list of the prompt: the longest run of single words joined by commas."""
    return max(re.findall(r"\w+(?:, \w+)+", prompt), key=len).split(", ")


def _after_colon(prompt):
    return prompt.split(": ", 1)[1]


def _numbers(prompt):
    return [int(digits) for digits in re.findall(r"\d+", prompt)]


def _list_item(index):
    return lambda prompt: _items(prompt)[index]


def _following(prompt):
    items = _items(prompt)
    word = re.search(r"after (\w+)", prompt).group(1)
    return items[items.index(word) + 1]


def _member(prompt):
    items = _items(prompt)
    outside = re.sub(r"\w+(?:, \w+)+", "", prompt.split(", ", 1)[1] if prompt.startswith("Yes") else prompt)
    return "yes" if set(re.findall(r"\w+", outside)) & set(items) else "no"


def _removed(prompt):
    items = _items(prompt)
    outside = prompt.replace(", ".join(items), "").split()
    return ", ".join(item for item in items if item not in " ".join(outside).replace(":", "").split())


def _replaced(prompt):
    head, phrase = prompt.rsplit(": ", 1)
    old = next(word for word in phrase.split() if word in head.replace(",", "").split())
    news = re.search(r"[Cc]hange \w+ to (\w+)|Put (\w+) for|with (\w+)$|Use (\w+),", head)
    new = next(group for group in news.groups() if group)
    return " ".join(new if word == old else word for word in phrase.split())


def _repeated(prompt):
    word = re.search(r"(\w+) (?:twice|three times)", prompt).group(1)
    return " ".join([word] * (2 if "twice" in prompt else 3))


def _opposites(prompt):
    first, second = re.search(r"(\w+) and (\w+)", prompt).groups()
    return f"{OPPOSITE[first]} and {OPPOSITE[second]}"


def _category(prompt):
    kind = next(kind for kind in KINDS if re.search(rf"\b{kind}\b", prompt))
    return next(item for item in _items(prompt) if item in KINDS[kind].split())


def _lookup(fact, question, key, value):
    def solve(prompt):
        facts = {m.group(key): m.group(value) for m in re.finditer(fact, prompt)}
        asked = re.search(question, re.sub(fact, "", prompt)).group(1)
        return facts[asked]

    return solve


def _owns(prompt):
    fact = r"(\w+) has a (\w+)\."
    thing = re.search(fact, prompt).group(2)
    return "yes" if re.search(r"a (\w+)\?", re.sub(fact, "", prompt)).group(1) == thing else "no"


SOLVERS = {
    "copy": _after_colon,
    "quote": lambda prompt: '"' + _after_colon(prompt) + '"',
    "first": _list_item(0),
    "second": _list_item(1),
    "third": _list_item(2),
    "last": _list_item(-1),
    "after": _following,
    "member": _member,
    "count": lambda prompt: str(prompt.count(",") + 1 - prompt.count("Yes")),
    "remove": _removed,
    "replace": _replaced,
    "join": lambda prompt: " and ".join(_items(prompt)),
    "swap": lambda prompt: " ".join(reversed(_after_colon(prompt).split())),
    "reverse": lambda prompt: ", ".join(reversed(_items(prompt))),
    "sort": lambda prompt: ", ".join(sorted(_items(prompt))),
    "repeat": _repeated,
    "upper": lambda prompt: _after_colon(prompt).upper(),
    "letters": lambda prompt: ", ".join(word[0] for word in _items(prompt)),
    "same": lambda prompt: "yes" if re.search(r"\b(\w+), \1\?", prompt) else "no",
    "opposite": _opposites,
    "category": _category,
    "place": _lookup(r"(\w+) is at the (\w+)\.", r"[Ww]here (?:is )?([A-Z]\w+)", 1, 2),
    "who": _lookup(r"The (\w+) is with (\w+)\.", r"has the (\w+)", 1, 2),
    "colour": _lookup(r"The (\w+) is (\w+)\.", r"the (\w+)[?.]", 1, 2),
    "owns": _owns,
    "add": lambda prompt: str(sum(_numbers(prompt))),
    "next": lambda prompt: str(_numbers(prompt)[0] + 1),
    "larger": lambda prompt: str(max(_numbers(prompt))),
    "more": lambda prompt: "yes" if _numbers(prompt)[0] > _numbers(prompt)[1] else "no",
}
