"""Scalar heads: a model whose head gives one number per position, for rewards and values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.core import ops
from jaxllm.core.spec import Spec
from jaxllm.core.types import Head, Model, Params
from jaxllm.models.layers import zeros


def with_scalar_head(model: Model) -> Model:
    """The same trunk with a head of one column, kernel [d, 1] and bias [1], zero at the start: every score begins at 0.

    Its parameters are the model's with one more leaf under `scalar`, so the model's weights carry over as they are.
    """
    d = model.config.d_model
    scalar = {"kernel": Spec((d, 1), ("embed", None), zeros), "bias": Spec((1,), (None,), zeros)}

    def head(params: Params) -> Head:
        return Head(params["scalar"]["kernel"], params["scalar"]["bias"], vocab_size=1)

    return model._replace(specs={**model.specs, "scalar": scalar}, head=head)


def graft(params: Params, trunk: Params) -> Params:
    """Freshly initialised parameters of `with_scalar_head` with the trunk's weights in place of its own."""
    return {**trunk, "scalar": params["scalar"]}


def scalars(model: Model, params: Params, record: Any) -> jax.Array:
    """The head's number at every position of a sequence record: [b, l] float32."""
    hidden = ops.forward(model, params, record).hidden
    head = model.head(params)
    return jnp.einsum("bld,do->blo", hidden.astype(jnp.float32), head.kernel)[..., 0] + head.bias[0]
