"""What is frozen is data: columns that one jitted scoring function adds to a data set before training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxllm.core.types import Batch, Params
from jaxllm.train.processes import on_host


def map_batches(fn: Callable[[Params, Batch], Any], params: Params, columns: Batch, batch_size: int) -> Any:
    """fn(params, batch) over all rows of host columns, `batch_size` at a time: the rows' results, on the host.

    The last batch is filled up with row 0 so that fn compiles once.
    """
    rows = jax.tree.leaves(columns)[0].shape[0]
    parts = []
    for start in range(0, rows, batch_size):
        index = np.arange(start, start + batch_size)
        index = np.where(index < rows, index, 0)
        parts.append(on_host(fn(params, jax.tree.map(lambda x, i=index: x[i], columns))))
    return jax.tree.map(lambda *xs: np.concatenate(xs)[:rows], *parts)


def with_reference_logps(
    sequence_logps: Callable[[Params, Batch], jax.Array], params: Params, columns: Batch, batch_size: int
) -> Batch:
    """Pair columns {chosen, rejected} with ref_chosen_logps and ref_rejected_logps [n] under the reference's params."""
    chosen, rejected = (map_batches(sequence_logps, params, columns[side], batch_size) for side in ("chosen", "rejected"))
    return {**columns, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
