"""Different optimizers for different parameters, chosen by path."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import optax

from jaxllm.core.tree import map_paths

REST = "rest"


def by_path(
    rules: Mapping[str, optax.GradientTransformation], rest: optax.GradientTransformation
) -> optax.GradientTransformation:
    """The optimizer of the first regular expression that has a match in a parameter's path; `rest` for the others.

    Each optimizer sees its own parameters only: a global norm in `rest` leaves out those of the rules.
    """

    def label(path: str, _: Any) -> str:
        return next((pattern for pattern in rules if re.search(pattern, path)), REST)

    return optax.multi_transform({**rules, REST: rest}, lambda params: map_paths(label, params))


def router_bias(rest: optax.GradientTransformation, rate: float) -> optax.GradientTransformation:
    """`rest`, but the routers' correction biases move by `rate` times the sign of their load's deficit (arXiv 2408.15664).

    The loss carries that sign as their gradient (`moe.apply`, bias_step): plain steps, without clipping, decay or schedule.
    """
    return by_path({r"router/bias$": optax.sgd(rate)}, rest)
