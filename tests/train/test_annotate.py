"""Columns made by one scoring function."""

import jax
import numpy as np
import pytest

from jaxllm.train.annotate import map_batches, with_reference_logps


@pytest.mark.parametrize("rows,batch_size", [(7, 3), (6, 3), (2, 8), (1, 1)])
def test_every_row_is_scored_once_in_order_with_one_shape(rows, batch_size):
    shapes = set()

    def fn(params, batch):
        shapes.add(batch["x"].shape)
        return {"sum": params * batch["x"].sum(axis=1), "first": batch["y"]["z"]}

    columns = {"x": np.arange(rows * 2.0).reshape(rows, 2), "y": {"z": np.arange(rows)}}
    out = map_batches(fn, 10.0, columns, batch_size)
    np.testing.assert_array_equal(out["sum"], 10 * columns["x"].sum(axis=1))
    np.testing.assert_array_equal(out["first"], np.arange(rows))
    assert shapes == {(batch_size, 2)}


def test_reference_logps_are_columns_of_their_own_side():
    def side(sign):
        return {"tokens": sign * np.arange(10).reshape(5, 2)}

    columns = {"chosen": side(1), "rejected": side(-1), "other": np.arange(5)}
    fn = jax.jit(lambda params, record: record["tokens"].sum(axis=1) * params)
    out = with_reference_logps(fn, 2, columns, 2)
    np.testing.assert_array_equal(out["ref_chosen_logps"], [2, 10, 18, 26, 34])
    np.testing.assert_array_equal(out["ref_rejected_logps"], -out["ref_chosen_logps"])
    assert out["chosen"] is columns["chosen"] and "ref_chosen_logps" not in columns
