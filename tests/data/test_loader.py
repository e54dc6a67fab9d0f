import json
import time

import numpy as np
import pytest

from jaxllm.core.types import UserError
from jaxllm.data.loader import check_state, epoch_order, fingerprint, make_loader

GOLDEN = [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]


def rows(n=23):
    """Columns in which every row says its number."""
    return {
        "x": np.arange(n),
        "side": {"tokens": np.arange(n)[:, None] * np.ones(3, int), "logp": np.arange(n) / 7},
    }


def stream(loader, steps):
    return np.concatenate([loader.batch(i)["x"] for i in range(steps)])


def test_batch_is_a_function_of_seed_and_step():
    a, b = make_loader(rows(), 5, 1), make_loader(rows(), 5, 1)
    forward = [a.batch(i)["x"].tolist() for i in range(12)]
    assert [b.batch(i)["x"].tolist() for i in reversed(range(12))] == forward[::-1]
    assert a.batch(3)["x"].tolist() == forward[3]


def test_every_row_once_an_epoch_though_the_batch_does_not_divide():
    seen = stream(make_loader(rows(23), 5, 0), 23)  # 115 rows: five epochs
    for epoch in range(5):
        assert sorted(seen[epoch * 23 : (epoch + 1) * 23]) == list(range(23))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {(s, e): epoch_order(100, s, e).tolist() for s in range(4) for e in range(4)}
    assert len({tuple(o) for o in orders.values()}) == 16
    assert list(range(100)) not in orders.values()


def test_order_is_uniform():
    places = np.array([epoch_order(8, seed, 0) for seed in range(4000)])
    counts = np.array([np.bincount(places[:, i], minlength=8) for i in range(8)])
    # chi-squared of 49 degrees of freedom: 95 is far in the tail, an uneven shuffle is in the hundreds
    assert ((counts - 500) ** 2 / 500).sum() < 95


def test_golden_order():
    """A resumed run depends on this order: if it changes, old checkpoints continue on other data."""
    assert epoch_order(10, 0, 0).tolist() == GOLDEN


def test_nested_columns_keep_their_rows_together():
    batch = make_loader(rows(), 6, 0).batch(4)
    assert batch["side"]["tokens"].shape == (6, 3)
    np.testing.assert_array_equal(batch["side"]["tokens"][:, 0], batch["x"])
    np.testing.assert_array_equal(batch["side"]["logp"], batch["x"] / 7)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_processes_take_contiguous_slices_of_the_same_global_batch(count):
    whole = make_loader(rows(), 6, 2)
    parts = [make_loader(rows(), 6, 2, process_index=p, process_count=count) for p in range(count)]
    for step in (0, 3, 50):
        joined = np.concatenate([p.batch(step)["x"] for p in parts])
        np.testing.assert_array_equal(joined, whole.batch(step)["x"])


def test_batch_larger_than_the_data_goes_on_into_the_next_epochs():
    batch = make_loader(rows(4), 10, 0).batch(0)["x"]
    assert sorted(batch[:4]) == sorted(batch[4:8]) == [0, 1, 2, 3]


def test_state_is_a_few_bytes_of_json():
    loader = make_loader(rows(), 5, 9)
    state = loader.state(np.int64(7))
    assert state == {"seed": 9, "step": 7, "fingerprint": fingerprint(rows())}
    assert len(json.dumps(state)) < 100
    check_state(loader, json.loads(json.dumps(state)))


def test_changed_data_is_an_error_that_names_both_fingerprints():
    changed = rows()
    changed["side"]["tokens"][22, 2] += 1
    old, new = make_loader(rows(), 5, 0), make_loader(changed, 5, 0)
    with pytest.raises(UserError) as error:
        check_state(new, old.state(3))
    assert old.state(0)["fingerprint"] in str(error.value) and new.state(0)["fingerprint"] in str(error.value)


def test_another_seed_is_an_error():
    with pytest.raises(UserError, match="seed 0.*config.seed is 1"):
        check_state(make_loader(rows(), 5, 1), make_loader(rows(), 5, 0).state(3))


def test_fingerprint_sees_order_shape_names_and_types():
    base = np.arange(12, dtype=np.int32)
    variants = [
        {"x": base}, {"x": base[::-1]}, {"x": base.reshape(3, 4)}, {"y": base}, {"x": base.astype(np.int64)},
        {"x": {"x": base}}, {"x": base, "y": base},
    ]  # fmt: skip
    assert len({fingerprint(v) for v in variants}) == len(variants)


def test_fingerprint_leaves_out_the_values_of_computed_columns():
    a = {"x": np.arange(3), "logp": np.ones(3)}
    assert fingerprint(a) == fingerprint({**a, "logp": np.nextafter(np.ones(3), 2)})
    assert fingerprint(a) == fingerprint({**a, "logp": np.ones(3, np.float32)})
    assert fingerprint(a) != fingerprint({"x": np.arange(3)})


def test_fingerprint_of_three_million_tokens_is_quick():
    columns = {"tokens": np.zeros((46_875, 64), np.int32)}
    start = time.perf_counter()
    fingerprint(columns)
    assert time.perf_counter() - start < 0.5  # about 0.02 s on an idle machine


def test_a_batch_costs_little():
    loader = make_loader({"tokens": np.zeros((75_000, 64), np.int32)}, 64, 0)
    loader.batch(0)
    start = time.perf_counter()
    for step in range(200):
        loader.batch(step)
    assert (time.perf_counter() - start) / 200 < 1e-3  # about 0.06 ms on an idle machine


@pytest.mark.parametrize(
    ("columns", "batch", "options", "words"),
    [
        (rows(), 5, {"process_count": 2}, "batch_size=5 does not divide over 2 processes"),
        (rows(), 0, {}, "batch_size=0"),
        (rows(0), 4, {}, "no rows"),
        (rows(), 4, {"seed": -1}, "seed=-1"),
    ],
)
def test_bad_settings_are_user_errors(columns, batch, options, words):
    options = {"seed": 0, **options}
    with pytest.raises(UserError, match=words):
        make_loader(columns, batch, **options)


def test_columns_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="different numbers"):
        make_loader({"x": np.arange(3), "y": np.arange(4)}, 1, 0)
