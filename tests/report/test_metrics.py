"""The table of metrics: every name in the code has a row, and every row its words."""

import ast
import re

import pytest

from jaxllm.report import metrics
from tests.conftest import ROOT

# names with a group, as they stand in the sources; a loss's own, without one, get train/ by the logger
GROUPS = "train eval rewards logps objective loss policy val first clip_ratio completions sampling moe guard pairs rows time perf"
NAME = re.compile(rf"({GROUPS.replace(' ', '|')})/[a-z_/]+")
FILES = [*(ROOT / "jaxllm" / "losses").rglob("*.py"), *(ROOT / "jaxllm" / "train").glob("*.py")]
FILES += [p for p in (ROOT / "experiments").glob("*.py") if p.stem not in ("feedback", "rubric")]


def keys(source):
    """Constant keys of dicts and of assignments to items."""
    for node in ast.walk(ast.parse(source)):
        found = node.keys if isinstance(node, ast.Dict) else [node.slice] if isinstance(node, ast.Subscript) else []
        yield from (k.value for k in found if isinstance(k, ast.Constant) and isinstance(k.value, str))


def own_keys(function):
    """Keys of dicts whose values are Means: what a loss reports."""
    for node in ast.walk(ast.parse(function)):
        if isinstance(node, ast.Dict) and any("mean" in ast.unparse(v).partition("(")[0].lower() for v in node.values):
            yield from (k.value for k in node.keys if isinstance(k, ast.Constant))


def test_every_name_in_the_code_has_a_row():
    found = {key for path in FILES for key in keys(path.read_text(encoding="utf-8")) if NAME.fullmatch(key)}
    assert len(found) > 40
    in_result_alone = {"eval/calibration_error", "eval/length_only_accuracy", "eval/accuracy_start"}
    assert not sorted(name for name in found - in_result_alone if metrics.find(name) is None)


def test_every_metric_of_a_loss_has_a_row():
    sources = (path.read_text(encoding="utf-8") for path in FILES if "losses" in path.parts)
    found = {key if "/" in key else f"train/{key}" for source in sources for key in own_keys(source)}
    outside = {"train/positive", "train/logits"}  # a process reward model's, which no experiment trains
    known = lambda name: metrics.find(name) or metrics.find(name.replace("train/", "moe/"))  # noqa: E731
    assert len(found) > 20 and not sorted(name for name in found - outside if not known(name))


def test_every_row_has_words_and_sound_bounds():
    for m in (m for section in metrics.SECTIONS.values() for m in section):
        assert m.names and m.formula and m.healthy and m.advice, m.names
        assert "|" not in m.formula + m.healthy + m.advice, m.names
        assert m.low is None or m.high is None or m.low < m.high


@pytest.mark.parametrize("name", ["rewards/format:<b>.*</b>/std", "exact_match/sum", "eval/rewards/a/mean", "round/other"])
def test_names_with_a_part_of_any_text(name):
    assert metrics.find(name) is not None


def test_a_name_that_only_begins_like_one_is_unknown():
    assert metrics.find("train/losses") is None and metrics.find("rewards//mean") is None
