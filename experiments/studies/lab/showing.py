"""From values over seeds to claims with intervals and to plots with bands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments.studies.lab.ground import Ground, sample
from experiments.studies.lab.models import Lab
from jaxllm.evals import stats
from jaxllm.report.run import Claim, at_least, at_most


def more(text: str, values: Any, bound: float, kind: str = "finding") -> Claim:
    """The claim that the mean of values [seeds] is at least the bound, with Student's t interval."""
    x = stats.mean_interval(values)
    return at_least(text, x.mean, bound, kind=kind, low=x.low, high=x.high)


def less(text: str, values: Any, bound: float, kind: str = "finding") -> Claim:
    """The claim that the mean of values [seeds] is at most the bound, with Student's t interval."""
    x = stats.mean_interval(values)
    return at_most(text, x.mean, bound, kind=kind, low=x.low, high=x.high)


def banded(x: Any, curves: Mapping[str, Any]) -> tuple[dict, dict]:
    """(lines, bands) for figures.line_plot of curves {name: [seeds, points]} at x [points]: the means and their intervals."""
    found = {name: [stats.mean_interval(column) for column in np.asarray(values).T] for name, values in curves.items()}
    lines = {name: (list(x), [i.mean for i in row]) for name, row in found.items()}
    return lines, {name: ([i.low for i in row], [i.high for i in row]) for name, row in found.items()}


def failed(claims: list[Claim]) -> str:
    """The names of the claims that do not hold, for the last sentence of a study's findings."""
    return "; ".join(claim.name for claim in claims if not claim.holds) or "nothing"


def along(curves: Mapping[str, tuple[Any, Any]], band: str = "") -> tuple[dict, dict]:
    """(lines, bands) for figures.line_plot of {name: (x [seeds, points], y [seeds, points])}, each drawn at its own mean x.

    Only lines whose name holds `band` get one.
    """
    lines, bands = {}, {}
    for name, (x, y) in curves.items():
        found = [stats.mean_interval(column) for column in np.asarray(y).T]
        lines[name] = (list(np.asarray(x).mean(axis=0)), [i.mean for i in found])
        if band in name:
            bands[name] = ([i.low for i in found], [i.high for i in found])
    return lines, bands


def show_strings(run: Any, lab: Lab, g: Ground, policies: Mapping[str, Any], step: int) -> None:
    """Three strings of each policy into the run's samples, as letters: capitals are good words."""
    draw = jax.jit(lambda params: sample(lab, g.world, params, jax.random.key(9), 3))
    for name, params in policies.items():
        for words in np.asarray(draw(params)["targets"]):
            letters = [chr((65 if g.world.good[w] else 97) + w) if w < g.world.vocab else "?" for w in words]
            run.sample(step, name, "".join(letters))
