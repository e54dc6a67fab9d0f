"""Checks of the tokenizer and of the chat template."""

from __future__ import annotations

from experiments.doctor.capture import Seen
from experiments.doctor.data import CHATS
from experiments.doctor.verdict import Verdict, absent, at_most
from jaxllm.data import chat

READERS = ("mlm", "classify")  # whose models write no text
TEXTS = (
    "Hello, world.", "  two  spaces ", "a line\nand\tanother\n", "naïve café", "漢字 и кириллица", "3.14159 and 1234567890",
    "def f(x):\n    return x", "🙂 fine", "a\u2028b", "‏שלום",
)  # fmt: skip
TALK = [
    {"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue is one."},
    {"role": "user", "content": "And\nanother?"}, {"role": "assistant", "content": "Green."},
]  # fmt: skip


def round_trip(seen: Seen) -> Verdict:
    """decode(encode(text)) is the text."""
    tokenizer = seen.fit["tokenizer"]
    try:
        ids = [tokenizer.encode(t) for t in TEXTS]
    except Exception as error:  # a vocabulary of whole words, whose library raises what it likes
        return absent("round trip", f"the vocabulary is not open: {error}"[:100])
    lost = [t for t, x in zip(TEXTS, ids, strict=True) if tokenizer.decode(x) != t]
    if lost and seen.experiment in READERS:
        return absent("round trip", f"an encoder writes nothing: its tokenizer may change {len(lost)} of {len(TEXTS)} texts")
    said = f"of {len(TEXTS)} texts decode(encode(text)) is another: {lost[:2]}" if lost else f"{len(TEXTS)} texts come back"
    return at_most("round trip", len(lost), 0, said, "use a tokenizer that loses nothing (bpe, byte), or know that it does")


def plain_specials(seen: Seen) -> Verdict:
    """The spelling of a special token in a user's text is plain text."""
    tokenizer = seen.fit["tokenizer"]
    control = set(tokenizer.specials.values())
    written = {name: tokenizer.piece(i) for name, i in tokenizer.specials.items()}
    try:
        found = [name for name, text in written.items() if control & set(tokenizer.encode(f"a {text} b"))]
    except Exception as error:
        return absent("specials are text", f"the vocabulary is not open: {error}"[:100])
    said = f"{', '.join(sorted(set(written.values())))[:80]}" + (f": {', '.join(found)} become control tokens" if found else "")
    return at_most("specials are text", len(found), 0, said, "encode users' text without special tokens: it could end a turn")


def template_grows(seen: Seen) -> Verdict:
    """A prefix of a conversation is a prefix of its tokens, the opening of the answer too; only answers are in the mask."""
    tokenizer = seen.fit["tokenizer"]
    if seen.experiment not in CHATS:
        return absent("template grows", "this stage has no conversations")
    encoded = [chat.encode_chat(tokenizer, TALK[:n]) for n in range(1, len(TALK) + 1)]
    prompts = [chat.encode_chat(tokenizer, TALK[:n], generation_prompt=True) for n in (1, 3)]
    pairs = [(a, b) for a, b in zip(encoded, encoded[1:], strict=False)] + [(prompts[0], encoded[1]), (prompts[1], encoded[3])]
    broken = sum(a.tokens.tolist() != b.tokens[: len(a.tokens)].tolist() for a, b in pairs)
    last = encoded[-1]
    trained = tokenizer.decode(last.tokens[last.mask].tolist())
    wrong = [m["content"] for m in TALK if (m["content"] in trained) != (m["role"] == "assistant")]
    said = f"trained of a conversation: {trained[:60]!r}"
    do = "the template rewrites earlier turns or trains the user's: the prompt at sampling time is not what was trained"
    return at_most("template grows", broken + len(wrong), 0, said, do)


CHECKS = {"round trip": round_trip, "specials are text": plain_specials, "template grows": template_grows}
