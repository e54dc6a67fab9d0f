"""Text as its tokens come: the pieces are the whole, characters come whole, and stop sequences are never shown."""

import numpy as np
import pytest

from jaxllm.data import tokenizer as tokenizers
from jaxllm.generate import text

TEXT = "One café, two naïve — 東京 🙂 end.  Two spaces and a newline\n▁ of sentencepiece's own."


def sentencepiece():
    words = [f"word{i} café naïve one two three spaces newline end {i * 7}" for i in range(200)]
    return tokenizers.train_sentencepiece(words, 360)


@pytest.mark.parametrize("make", [tokenizers.byte_tokenizer, sentencepiece], ids=["byte", "sentencepiece"])
def test_the_pieces_are_the_whole(make):
    tokenizer = make()
    random = np.random.default_rng(0).integers(0, tokenizer.vocab_size, 300).tolist()  # broken characters, specials
    for ids in (tokenizer.encode(TEXT), random):
        tail, pieces = text.Tail(), []
        for token in ids:
            tail, piece = text.add(tokenizer.decode, tail, token)
            pieces.append(piece)
        assert "".join(pieces) + text.rest(tokenizer.decode, tail) == tokenizer.decode(ids)
        if ids is not random:
            assert "\ufffd" not in "".join(pieces) and len([p for p in pieces if p]) > 20


def test_a_stop_sequence_is_held_back_until_it_is_certain():
    stops, shown, held = ("STOP", "\n\n"), "", ""
    for piece in ("go", " ST", "AY S", "T", "OP and", " more"):
        new, held, met = text.before_stop(held + piece, stops)
        shown += new
        if met:
            break
    assert shown == "go STAY " and met
    assert text.before_stop("a\n", stops) == ("a", "\n", False)
    assert text.before_stop("a\nb", stops) == ("a\nb", "", False)
    assert text.before_stop("x\n\nySTOP", stops) == ("x", "", True)
    assert text.before_stop("abc", ()) == ("abc", "", False)
