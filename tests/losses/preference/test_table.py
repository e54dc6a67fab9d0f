"""docs/preference.md says what the code says, of every loss."""

import inspect

import pytest

from jaxllm.losses import preference
from jaxllm.losses.preference import divergence, free, pairs, table, tokens, unpaired
from tests.test_docs import script

EVERY = table.PAIRS + table.FREE + table.UNPAIRED + table.TOKENS
HELPERS = {"log_ratios", "log_ratio_margin", "per_token", "log1mexp", "power_score", "batch_kl", "row_loss", "shared_weights"}


def test_the_page_and_the_figure_are_current():
    made = script("make_preference_table")
    assert made.page() == made.PAGE.read_text(encoding="utf-8"), "run python scripts/make_preference_table.py"
    assert made.figure() == made.FIGURE.read_text(encoding="utf-8"), "run python scripts/make_preference_table.py"


def test_every_loss_is_in_the_table_and_exported():
    public = {
        name
        for module in (pairs, free, divergence, unpaired, tokens)
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }
    assert public - HELPERS == {e.name for e in EVERY}
    assert len({e.name for e in EVERY}) == len(EVERY)
    assert all(getattr(preference, e.name) is e.fn for e in EVERY)
    assert {e.name for e in EVERY} <= set(preference.__all__)


def test_every_loss_with_a_weight_is_in_the_figure():
    panels = script("make_preference_table").PANELS
    assert {n for names in panels.values() for n in names} == {e.name for e in table.PAIRS + table.FREE + table.UNPAIRED}


@pytest.mark.parametrize("entry", EVERY, ids=lambda e: e.name)
def test_docstrings_name_the_source(entry):
    if entry.fn is not divergence.reverse_kl:
        assert entry.source.split()[0] in entry.fn.__doc__
    given = set(inspect.signature(entry.fn).parameters)
    assert set(entry.hyper) <= given, "settings of the figure that the loss does not take"
