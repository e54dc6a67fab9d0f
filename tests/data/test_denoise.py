"""Span corruption loses no token and has the published lengths; pairs come out as they went in; tasks mix at their rates."""

import itertools

import numpy as np
import pytest

from jaxllm.core.types import UserError
from jaxllm.data import denoise, pack
from jaxllm.data import tokenizer as tokenizers
from jaxllm.data.denoise import Pair

BYTES = denoise.with_sentinels(tokenizers.byte_tokenizer())
SENTINELS, EOS, PAD = denoise.sentinel_ids(BYTES), BYTES.specials["eos"], BYTES.specials["pad"]


def restored(inputs, targets, sentinels):
    """The original tokens: every sentinel of the inputs gives way to what follows it in the targets."""
    assert inputs[-1] == targets[-1] == EOS
    spans, known = {}, set(sentinels.tolist())
    for token in targets[:-1].tolist():
        if token in known:
            spans[token] = []
        else:
            spans[list(spans)[-1]].append(token)
    assert all(spans.values()), "a span without tokens"
    used = [t for t in inputs.tolist() if t in known]
    assert used == list(spans) == sentinels[: len(spans)].tolist(), "sentinels count down from the top, on both sides"
    return [t for token in inputs[:-1].tolist() for t in (spans[token] if token in known else [token])]


# ---- sentinels


def test_sentinels_stand_at_the_top_and_count_down():
    plain = tokenizers.byte_tokenizer()
    assert BYTES.vocab_size == plain.vocab_size + 100 and len(SENTINELS) == 100
    assert SENTINELS[0] == BYTES.vocab_size - 1 and SENTINELS[99] == plain.vocab_size
    assert BYTES.piece(int(SENTINELS[7])) == "<extra_id_7>" and BYTES.piece(65) == "A"
    assert BYTES.decode([65, int(SENTINELS[0]), 66]) == "AB"
    assert BYTES.encode("<extra_id_0>") == list(b"<extra_id_0>")
    assert tokenizers.fingerprint(BYTES) == tokenizers.fingerprint(plain)
    assert denoise.with_sentinels(BYTES) is BYTES


def test_sentinels_of_a_published_vocabulary_are_used(tmp_path):
    from tokenizers import AddedToken, Tokenizer, models

    fast = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "word": 3}, unk_token="<unk>"))
    names = ("<pad>", "</s>", *(f"<extra_id_{i}>" for i in (2, 1, 0)))
    fast.add_special_tokens([AddedToken(name, special=True) for name in names])
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizers.load(tmp_path)
    assert denoise.with_sentinels(tokenizer) is tokenizer
    assert denoise.sentinel_ids(tokenizer).tolist() == [6, 5, 4]


# ---- span corruption


def test_lengths_are_t5s():
    """512 inputs: 568 tokens, 85 of them in 28 spans; 114 targets (t5.data.preprocessors)."""
    assert denoise.raw_length(512) == 568 and denoise.lengths(568) == (512, 114)
    assert denoise.noise_counts(568) == (85, 28)
    for inputs in range(3, 200):
        raw = denoise.raw_length(inputs)
        assert denoise.lengths(raw)[0] <= inputs < denoise.lengths(raw + 1)[0]


@pytest.mark.parametrize("raw", [2, 3, 4, 7, 20, 64, 568])
@pytest.mark.parametrize("density,mean_span", [(0.15, 3.0), (0.5, 3.0), (0.15, 1.0), (0.9, 8.0)])
def test_masks_have_the_counts_for_every_row(raw, density, mean_span):
    noise, spans = denoise.noise_counts(raw, density, mean_span)
    mask = denoise.noise_masks(50, raw, denoise.bits_of(3, 0), density=density, mean_span=mean_span)
    assert mask.shape == (50, raw) and (mask.sum(1) == noise).all()
    begins = mask & ~np.pad(mask, ((0, 0), (1, 0)))[:, :-1]
    assert (begins.sum(1) == spans).all()
    assert not mask[:, 0].any() and mask[:, -1].all()


def test_partitions_are_uniform():
    """4 noise tokens in 2 spans and 6 others in 2: 3 x 5 masks, each as likely as any."""
    mask = denoise.noise_masks(15_000, 10, denoise.bits_of(0, 0), density=0.4, mean_span=2.0)
    counts = np.unique(mask, axis=0, return_counts=True)[1]
    assert len(counts) == 15
    assert ((counts - 1000) ** 2 / 1000).sum() < 36.1  # 14 degrees of freedom, p = 0.001


@pytest.mark.parametrize("length", [4, 9, 32, 100])
def test_no_token_is_lost(length):
    raw = denoise.raw_length(length)
    rows = np.random.default_rng(0).integers(0, 256, (40, raw)).astype(np.int32)
    record = denoise.spans(rows, BYTES, seed=5)
    assert record["inputs"]["tokens"].shape == (40, denoise.lengths(raw)[0])
    assert record["targets"].shape == (40, denoise.lengths(raw)[1])
    for row, inputs, targets in zip(rows, record["inputs"]["tokens"], record["targets"], strict=True):
        assert restored(inputs, targets, SENTINELS) == row.tolist()
    assert record["mask"].all() and (record["segments"] == 1).all() and (record["inputs"]["segments"] == 1).all()
    np.testing.assert_array_equal(record["tokens"][:, 1:], record["targets"][:, :-1])
    assert (record["tokens"][:, 0] == PAD).all()
    assert {x.dtype for x in record["inputs"].values()} == {np.dtype(np.int32)}


def test_noise_depends_on_seed_copy_and_row_alone():
    rows = np.random.default_rng(0).integers(0, 256, (6, 60)).astype(np.int32)
    twice = denoise.spans(rows, BYTES, seed=1, copies=2)
    once = denoise.spans(rows[:4], BYTES, seed=1)
    np.testing.assert_array_equal(twice["targets"][:4], once["targets"])
    assert not np.array_equal(twice["targets"][:6], twice["targets"][6:])
    assert not np.array_equal(once["targets"], denoise.spans(rows[:4], BYTES, seed=2)["targets"])
    known = denoise.noise_masks(1, 12, denoise.bits_of(7, 0), density=0.5, mean_span=2.0)[0]
    assert "".join(".x"[int(m)] for m in known) == "..xxxx..x..x", "a resumed run would read other noise"


def test_rows_are_corrupted_in_chunks_as_if_at_once(monkeypatch):
    rows = np.random.default_rng(0).integers(0, 256, (11, 40)).astype(np.int32)
    whole = denoise.spans(rows, BYTES, seed=1, copies=2)
    monkeypatch.setattr(denoise, "CHUNK", 3)
    parts = denoise.spans(rows, BYTES, seed=1, copies=2)
    np.testing.assert_array_equal(whole["targets"], parts["targets"])
    np.testing.assert_array_equal(whole["inputs"]["tokens"], parts["inputs"]["tokens"])


def test_too_many_spans_are_said():
    rows = np.zeros((1, 2300), np.int32)
    with pytest.raises(UserError, match="115 noise spans a row, but the vocabulary has 100 sentinels"):
        denoise.spans(rows, BYTES, seed=0)
    with pytest.raises(UserError, match="span corruption to 2 inputs"):
        denoise.raw_length(2)
    with pytest.raises(UserError, match="config.seed=-1 must not be negative"):
        denoise.spans(rows, BYTES, seed=-1)


def test_the_stream_is_the_documents_in_order():
    rows = denoise.stream(BYTES, ["abc", "de", "fghij"], 4)
    assert rows.tolist() == [[*b"abc", EOS], [*b"de", EOS, *b"f"], [*b"ghij"]]


def test_prefix_lm_cuts_every_row_once():
    rows = np.random.default_rng(0).integers(0, 256, (400, 9)).astype(np.int32)
    pairs = denoise.prefix_lm(rows, BYTES, seed=0)
    for row, (a, b) in zip(rows, pairs, strict=True):
        assert a[-1] == b[-1] == EOS and [*a[:-1], *b[:-1]] == row.tolist()
    assert {len(a) - 1 for a, _ in pairs} == set(range(1, 9))


# ---- pairs


def make(n, m, base=0):
    return Pair(np.arange(1 + base, n + 1 + base, dtype=np.int32), np.arange(101 + base, m + 101 + base, dtype=np.int32))


def test_two_pairs_share_a_row_when_both_sides_have_room():
    record, report = denoise.pack_pairs([make(3, 2), make(2, 2, 10), make(1, 3, 20)], 6, 5)
    assert record["inputs"]["tokens"].tolist() == [[1, 2, 3, 11, 12, 0], [21, 0, 0, 0, 0, 0]]
    assert record["inputs"]["segments"].tolist() == [[1, 1, 1, 2, 2, 0], [1, 0, 0, 0, 0, 0]]
    assert record["targets"].tolist() == [[101, 102, 111, 112, 0], [121, 122, 123, 0, 0]]
    assert record["tokens"].tolist() == [[0, 101, 0, 111, 0], [0, 121, 122, 0, 0]]
    assert record["segments"].tolist() == [[1, 1, 2, 2, 0], [1, 1, 1, 0, 0]]
    assert record["mask"].tolist() == [[True] * 4 + [False], [True] * 3 + [False] * 2]
    assert (report["rows"], report["examples"], report["tokens"], report["trained_tokens"]) == (2, 3, 13, 7)
    assert report["fill"] == 13 / 22 and report["truncated"] == 0
    pack.check_report(report, "data")


@pytest.mark.parametrize("window", [1024, 50])
def test_every_pair_comes_out_as_it_went_in(window):
    rng = np.random.default_rng(0)
    pairs = [Pair(rng.integers(1, 99, a).astype(np.int32), rng.integers(1, 99, b).astype(np.int32))
             for a, b in rng.integers(2, 12, (300, 2))]  # fmt: skip
    packed, padded = (
        f(pairs, 16, 14, start=7)[0] for f in (lambda *a, **k: denoise.pack_pairs(*a, **k, window=window), denoise.pad_pairs)
    )

    def found(record):
        for row in range(len(record["tokens"])):
            for s in range(1, record["segments"][row].max() + 1):
                i, t = record["inputs"]["segments"][row] == s, record["segments"][row] == s
                assert record["tokens"][row, t].tolist() == [7, *record["targets"][row, t][:-1]]
                yield tuple(record["inputs"]["tokens"][row, i].tolist()), tuple(record["targets"][row, t].tolist())

    expected = [(tuple(a.tolist()), tuple(b.tolist())) for a, b in pairs]
    assert list(found(padded)) == expected
    assert sorted(found(packed)) == sorted(expected)
    assert len(packed["tokens"]) < 0.75 * len(padded["tokens"])


def test_what_is_cut_counts_and_inputs_keep_their_eos():
    pairs = [make(9, 2), make(2, 9), make(3, 1)]
    record, report = denoise.pad_pairs(pairs, 4, 3)
    assert record["inputs"]["tokens"].tolist() == [[1, 2, 3, 9], [1, 2, 0, 0], [1, 2, 3, 0]]
    assert record["targets"].tolist() == [[101, 102, 0], [101, 102, 103], [101, 0, 0]]
    assert (report["truncated"], report["truncated_inputs"], report["truncated_targets"]) == (2, 1, 1)
    assert report["untrained"] == 1 and report["first_untrained"] == 2
    with pytest.raises(UserError, match="1 of 3 examples have no trained token .the first is number 3"):
        pack.check_report(report, "data")
    assert denoise.pack_pairs([], 4, 3)[1]["rows"] == 0


def test_rows_as_text():
    assert denoise.text_pair({"input": "a b", "target": "b", "task": "last"}, "x") == ("last: a b", "b")
    assert denoise.text_pair({"prompt": "a", "completion": "b", "task": None}, "x") == ("a", "b")
    assert denoise.text_pair({"inputs": "a", "targets": ""}, "x") == ("a", "")
    with pytest.raises(UserError, match="rows.jsonl row 3 needs input and target.*`completions` .did you mean `completion`"):
        denoise.text_pair({"prompt": "a", "completions": "b"}, "rows.jsonl row 3")
    with pytest.raises(UserError, match="row 1: input and target must be text"):
        denoise.text_pair({"input": "a", "target": 3}, "row 1")
    with pytest.raises(UserError, match="row 1 is a list"):
        denoise.text_pair([], "row 1")
    pair = denoise.encode_pair(BYTES, "hi", "")
    assert pair.inputs.tolist() == [*b"hi", EOS] and pair.targets.tolist() == [EOS]


# ---- mixing


def test_mixing_rates_by_hand():
    np.testing.assert_allclose(denoise.mixing_rates([10, 30, 60]), [0.1, 0.3, 0.6])
    np.testing.assert_allclose(denoise.mixing_rates([10, 30, 60], limit=30), [1 / 7, 3 / 7, 3 / 7])
    roots = np.sqrt([0.1, 0.3, 0.6])
    np.testing.assert_allclose(denoise.mixing_rates([10, 30, 60], temperature=2), roots / roots.sum())
    np.testing.assert_allclose(denoise.mixing_rates([10, 30, 60], temperature=1e9), [1 / 3] * 3, rtol=1e-6)
    for bad in ({"sizes": [0, 3]}, {"sizes": [1], "temperature": 0}, {"sizes": [1], "limit": 0}, {"sizes": []}):
        with pytest.raises(UserError, match="mixing tasks"):
            denoise.mixing_rates(**bad)


def test_draws_follow_the_rates_and_leave_no_example_out():
    sizes, rates = [7, 40, 400], np.array([0.5, 0.3, 0.2])
    draws = denoise.mix(sizes, rates, 2000, seed=4)
    counts = np.bincount([t for t, _ in draws])
    assert np.abs(counts / 2000 - rates).max() < 0.04
    first = [e for t, e in draws if t == 0]
    for a, b in itertools.pairwise(range(0, len(first) // 7 * 7 + 1, 7)):
        assert sorted(first[a:b]) == list(range(7))
    assert first[:7] != first[7:14] and len({e for t, e in draws if t == 2}) == min(counts[2], 400)
    assert denoise.mix(sizes, rates, 2000, seed=4) == draws != denoise.mix(sizes, rates, 2000, seed=5)
    assert denoise.mix(sizes, rates, 100, seed=4) == draws[:100]
