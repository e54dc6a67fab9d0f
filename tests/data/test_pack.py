import time

import numpy as np
import pytest

from jaxllm.core.types import UserError
from jaxllm.data import pack
from jaxllm.data.chat import Example


def example(*tokens, mask=None):
    return Example(np.array(tokens, np.int32), np.array([True] * len(tokens) if mask is None else mask, bool))


def random_examples(n, low, high, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Example(rng.integers(1, 1000, m).astype(np.int32), rng.random(m) < 0.5)
        for m in rng.integers(low, high, n)
    ]


def documents(record):
    """The (inputs, targets, mask) of every segment of a record, as tuples."""
    found = []
    for row in range(len(record["tokens"])):
        for s in range(1, record["segments"][row].max(initial=0) + 1):
            at = record["segments"][row] == s
            found.append(tuple(tuple(record[k][row, at].tolist()) for k in ("tokens", "targets", "mask")))
    return found


def shifted(e, length):
    tokens, mask = e.tokens[: length + 1].tolist(), e.mask[: length + 1].tolist()
    return tuple(tokens[:-1]), tuple(tokens[1:]), tuple(mask[1:])


def test_two_examples_share_a_row_and_a_third_opens_one():
    record, report = pack.pack([example(1, 2, 3), example(4, 5), example(6, 7, 8, 9)], 4)
    assert record["tokens"].tolist() == [[1, 2, 4, 0], [6, 7, 8, 0]]
    assert record["targets"].tolist() == [[2, 3, 5, 0], [7, 8, 9, 0]]
    assert record["segments"].tolist() == [[1, 1, 2, 0], [1, 1, 1, 0]]
    assert record["mask"].tolist() == [[True, True, True, False], [True, True, True, False]]
    assert {k: x.dtype for k, x in record.items()} == {
        "tokens": np.int32, "targets": np.int32, "segments": np.int32, "mask": bool,
    }  # fmt: skip
    assert (report["rows"], report["examples"], report["tokens"], report["fill"]) == (2, 3, 6, 0.75)


def test_first_fit_takes_the_first_row_with_room():
    record, _ = pack.pack([example(*range(1, n + 2)) for n in (3, 3, 1, 2)], 4)
    assert record["segments"].tolist() == [[1, 1, 1, 2], [1, 1, 1, 0], [1, 1, 0, 0]]


def test_mask_belongs_to_the_target_and_the_first_token_is_never_one():
    record, report = pack.pad([example(1, 2, 3, 4, mask=[True, False, True, False])], 3)
    assert record["mask"].tolist() == [[False, True, False]] and report["trained_tokens"] == 1


@pytest.mark.parametrize("make", [pack.pack, pack.pad])
def test_every_example_comes_out_as_it_went_in(make):
    examples = random_examples(3000, 2, 40)
    record, report = make(examples, 32)
    assert sorted(documents(record)) == sorted(shifted(e, 32) for e in examples)
    assert report["tokens"] == sum(min(len(e.tokens) - 1, 32) for e in examples)
    assert report["trained_tokens"] == sum(int(e.mask[1:33].sum()) for e in examples) == record["mask"].sum()
    assert report["truncated"] == sum(len(e.tokens) > 33 for e in examples) > 0
    assert report["fill"] == np.mean(record["segments"] > 0)


def test_padding_is_zero_and_right():
    record, _ = pack.pack(random_examples(500, 2, 20), 33)
    padding = record["segments"] == 0
    assert padding.any() and (np.diff(padding.astype(int), axis=1) >= 0).all()
    assert not record["tokens"][padding].any() and not record["targets"][padding].any()
    assert not record["mask"][padding].any()


def test_segments_count_up_from_one_in_each_row():
    record, _ = pack.pack(random_examples(500, 2, 20), 64)
    for row in record["segments"]:
        used = row[row > 0]
        assert used[0] == 1 and set(np.diff(used)) <= {0, 1}


def test_windows_keep_rows_apart_so_that_the_order_stays_near():
    examples = [example(i, i) for i in range(1, 9)]
    record, report = pack.pack(examples, 3, window=4)
    assert record["tokens"].tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 7], [8, 0, 0]]
    alone = pack.pack(examples[4:], 3, window=4)[0]
    np.testing.assert_array_equal(record["tokens"][2:], alone["tokens"])
    assert pack.pack(examples, 3)[1]["rows"] == 3 < report["rows"]


def test_pad_gives_each_example_its_row_in_order():
    record, report = pack.pad([example(1, 2), example(3, 4, 5)], 3)
    assert record["tokens"].tolist() == [[1, 0, 0], [3, 4, 0]]
    assert record["segments"].tolist() == [[1, 0, 0], [1, 1, 0]]
    assert report["fill"] == 0.5


@pytest.mark.parametrize("m", [1, 2, 5, 6, 7, 11, 12, 40])
def test_split_long_trains_every_target_exactly_once(m):
    whole = Example(np.arange(m, dtype=np.int32), np.arange(m) % 3 > 0)
    pieces = pack.split_long(whole, 5)
    assert all(len(p.tokens) <= 6 for p in pieces)
    targets = np.concatenate([p.tokens[1:] for p in pieces])
    np.testing.assert_array_equal(targets, np.arange(1, m))
    np.testing.assert_array_equal(np.concatenate([p.mask[1:] for p in pieces]), whole.mask[1:])
    assert all(a.tokens[-1] == b.tokens[0] for a, b in zip(pieces[:-1], pieces[1:], strict=True))
    if m > 1:
        assert pack.pack(pieces, 5)[1]["truncated"] == 0


@pytest.mark.parametrize("cut", [pack.pack, pack.pad, lambda examples, length: pack.split_long(examples[0], length)])
def test_a_row_has_a_length(cut):
    for length in (0, -3):
        with pytest.raises(UserError, match=f"config.data.length={length} must be at least 1"):
            cut([example(1, 2, 3)], length)


def test_report_counts_what_is_cut_dropped_and_untrained():
    cut_away = example(1, 2, 3, 4, 5, 6, mask=[False] * 4 + [True] * 2)
    first_only = example(1, 2, mask=[True, False])
    report = pack.pack([example(1), example(1, 2), cut_away, first_only], 3)[1]
    counts = {k: report[k] for k in ("rows", "examples", "truncated", "dropped", "untrained")}
    assert counts == {"rows": 2, "examples": 4, "truncated": 1, "dropped": 1, "untrained": 2}
    assert report["first_untrained"] == 2


def test_histogram_counts_lengths_before_the_cut():
    report = pack.pack(
        random_examples(3, 8, 9) + random_examples(2, 9, 17) + random_examples(1, 100, 101), 4
    )[1]
    assert report["lengths"] == {"<=8": 3, "<=16": 2, "<=32": 0, "<=64": 0, "<=128": 1}


def test_more_than_a_twentieth_untrained_is_an_error():
    good, bad = example(1, 2), example(1, 2, mask=[False, False])
    pack.check_report(pack.pack([good] * 19 + [bad], 8)[1], "chats.jsonl")
    with pytest.raises(UserError, match=r"^chats.jsonl: 2 of 20 examples have no trained token.*number 19\)"):
        pack.check_report(pack.pack([good] * 18 + [bad] * 2, 8)[1], "chats.jsonl")


@pytest.mark.parametrize(("examples", "why"), [([], "no examples"), ([example(1)] * 2, "all 2 examples")])
def test_no_rows_is_an_error(examples, why):
    record, report = pack.pack(examples, 8)
    assert record["tokens"].shape == (0, 8) and report["fill"] == 0
    with pytest.raises(UserError, match=f"text.jsonl: nothing to train on.*{why}"):
        pack.check_report(report, "text.jsonl")


def test_length_zero_is_an_error():
    with pytest.raises(UserError, match="length=0"):
        pack.pack([example(1, 2)], 0)


def test_packing_many_short_examples_is_quick_and_dense():
    examples = random_examples(20_000, 8, 24)
    start = time.perf_counter()
    report = pack.pack(examples, 64)[1]
    assert time.perf_counter() - start < 3.0  # about 0.15 s on an idle machine
    assert report["fill"] > 0.94
