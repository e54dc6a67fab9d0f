"""Masking has the published rates, spares special tokens, and loses no text."""

import jax
import numpy as np
import pytest

from jaxllm.core.types import UserError
from jaxllm.data import masking
from jaxllm.data import tokenizer as tokenizers

BYTE = tokenizers.byte_tokenizer()
FULL = masking.extended(BYTE)
VOCAB = masking.ordinary_ids(FULL)
MASK = FULL.specials["mask"]
TEXTS = [f"document {i}: " + "the quick brown fox jumps over the lazy dog. " * (i % 4 + 1) for i in range(12)]


@pytest.fixture(scope="module")
def drawn():
    tokens = np.random.default_rng(0).integers(97, 123, (200, 100)).astype(np.int32)
    eligible = np.ones_like(tokens, bool)
    eligible[:, :20] = False
    inputs, chosen = jax.jit(
        lambda k, t, e: masking.mask_tokens(k, t, e, mask_id=MASK, vocab=VOCAB)
    )(jax.random.key(0), tokens, eligible)  # fmt: skip
    return tokens, eligible, np.asarray(inputs), np.asarray(chosen)


def near(count, n, p):
    """Within five standard deviations of a binomial."""
    return abs(count - n * p) < 5 * np.sqrt(n * p * (1 - p))


def test_rates_are_15_and_80_10_10(drawn):
    tokens, eligible, inputs, chosen = drawn
    n = chosen.sum()
    assert near(n, eligible.sum(), 0.15)
    masked, same = (inputs == MASK)[chosen].sum(), (inputs == tokens)[chosen].sum()
    other = n - masked - same
    accidental = 0.1 / len(VOCAB)  # a drawn id may be the token itself
    assert near(masked, n, 0.8) and near(same, n, 0.1 + accidental) and near(other, n, 0.1 - accidental)


def test_only_eligible_tokens_are_chosen_and_only_chosen_ones_change(drawn):
    tokens, eligible, inputs, chosen = drawn
    assert not chosen[~eligible].any()
    np.testing.assert_array_equal(inputs[~chosen], tokens[~chosen])


def test_random_replacement_never_draws_a_special_token(drawn):
    tokens, _, inputs, chosen = drawn
    replaced = inputs[chosen & (inputs != MASK) & (inputs != tokens)]
    assert len(np.unique(replaced)) > 100 and np.isin(replaced, VOCAB).all()
    assert not np.isin(VOCAB, list(FULL.specials.values())).any()
    assert len(VOCAB) + len(set(FULL.specials.values())) == FULL.vocab_size


def test_dynamic_masks_differ_by_key_and_static_ones_do_not():
    record, _ = masking.documents(FULL, TEXTS, 64)
    fixed = masking.with_static_masks(record, 0, mask_id=MASK, vocab=VOCAB)
    dynamic = masking.dynamic(mask_id=MASK, vocab=VOCAB)
    one, again, other = (dynamic(jax.random.key(k), fixed)[1] for k in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (np.asarray(one) != np.asarray(other)).any()
    for key in (jax.random.key(0), jax.random.key(1)):
        inputs, chosen = masking.static(key, fixed)
        np.testing.assert_array_equal(inputs, fixed["inputs"])
        np.testing.assert_array_equal(chosen, fixed["chosen"])
    assert fixed["chosen"].any()


def test_documents_are_framed_packed_and_whole():
    record, report = masking.documents(FULL, TEXTS, 64)
    cls, sep = FULL.specials["cls"], FULL.specials["sep"]
    text = b""
    for tokens, segments in zip(record["tokens"], record["segments"], strict=True):
        for segment in range(1, segments.max() + 1):
            ids = tokens[segments == segment]
            assert ids[0] == cls and ids[-1] == sep
            text += bytes(ids[1:-1].tolist())
    for document in TEXTS:  # packing may reorder pieces, so pieces are looked for
        pieces = [document.encode()[i : i + 62] for i in range(0, len(document.encode()), 62)]
        assert all(piece in text for piece in pieces)
    assert len(text) == sum(len(t.encode()) for t in TEXTS) and report["truncated"] == 0
    np.testing.assert_array_equal(record["eligible"], (record["segments"] != 0) & (record["tokens"] < 256))


def test_an_extended_tokenizer_keeps_its_files_and_appends_what_is_missing():
    assert FULL.vocab_size == BYTE.vocab_size + 2
    assert FULL.specials["sep"] == BYTE.specials["eos"]
    assert {FULL.specials["cls"], MASK} == {BYTE.vocab_size, BYTE.vocab_size + 1}
    assert tokenizers.fingerprint(FULL) == tokenizers.fingerprint(BYTE)
    assert masking.extended(FULL).specials == FULL.specials and masking.extended(FULL).vocab_size == FULL.vocab_size
    assert FULL.decode([MASK, *FULL.encode("a b"), FULL.specials["cls"]]) == "a b"
    assert FULL.piece(MASK) == "<|mask|>" and FULL.piece(97) == "a"


def test_published_specials_are_used():
    import dataclasses

    bert = dataclasses.replace(BYTE, specials={**BYTE.specials, "cls": 1, "sep": 2, "mask": 3})
    assert masking.extended(bert).specials == bert.specials and masking.extended(bert).vocab_size == BYTE.vocab_size
    roberta = masking.extended(dataclasses.replace(BYTE, specials={**BYTE.specials, "bos": 5}))
    assert roberta.specials["cls"] == 5 and roberta.specials["mask"] == BYTE.vocab_size


def test_pairs_follow_or_come_from_another_document():
    texts = [chr(97 + i) * 40 for i in range(10)]  # every document has a letter of its own
    record, _ = masking.next_sentence_rows(FULL, texts, 23, 0)
    cls, sep, letters = FULL.specials["cls"], FULL.specials["sep"], set()
    assert abs(record["is_next"].mean() - 0.5) < 0.05
    for tokens, segments, types, is_next in zip(*(record[k] for k in ("tokens", "segments", "types", "is_next")), strict=True):
        ids = tokens[segments != 0]
        (_, first, second) = (0, *np.flatnonzero(ids == sep))
        assert ids[0] == cls and second == len(ids) - 1
        a, b = ids[1:first], ids[first + 1 : second]
        assert len(set(a)) == len(set(b)) == 1 and (a[0] == b[0]) == is_next
        assert (types[: first + 1] == 0).all() and (types[first + 1 : second + 1] == 1).all() and not types[second + 1 :].any()
        letters.add(a[0])
    assert len(letters) == 10


def test_bad_lengths_and_too_few_documents_are_one_clear_line():
    with pytest.raises(UserError, match="need at least 3"):
        masking.documents(FULL, TEXTS, 2)
    with pytest.raises(UserError, match="at least 5"):
        masking.next_sentence_rows(FULL, TEXTS, 4, 0)
    with pytest.raises(UserError, match="at least 2 documents"):
        masking.next_sentence_rows(FULL, ["one document only, but long enough for parts"], 16, 0)
