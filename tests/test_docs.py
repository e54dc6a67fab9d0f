"""Pages with generated parts say what the code says."""

import importlib.util
import re

from jaxllm.convert.layout import families
from tests.conftest import ROOT


def script(name):
    found = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_the_page_of_architectures_is_current():
    tables = script("make_architectures")
    page = tables.PAGE.read_text()
    assert tables.filled(page) == page, "run python scripts/make_architectures.py"


def test_exact_published_sizes_are_ours():
    tables = script("make_architectures")
    ours = dict(tables.sizes())
    exact = {name: n for name, n in tables.PUBLISHED.items() if isinstance(n, int)}
    assert len(exact) > 25 and {name: ours[name] for name in exact} == exact
    assert set(ours) == set(tables.PUBLISHED)


def test_every_reference_in_the_table_can_be_converted():
    tables = script("make_architectures")
    named = {row.reference for row in tables.ROWS if row.reference and not row.reference.startswith("torch")}
    assert named <= set(families())
    assert all((ROOT / "tests" / f"{row.tests}.py").is_file() for row in tables.ROWS)


def test_adding_a_family_takes_at_most_forty_lines():
    tables = script("make_architectures")
    assert tables.example().count("\n") <= 40


def test_every_study_is_on_its_page_with_its_figures():
    """Written by scripts/make_studies.py from results; a study that is not there has not been measured."""
    page = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
    studies = ROOT / "experiments" / "studies"
    names = [p.stem for p in studies.glob("*.py") if p.stem != "__init__"]
    names += [p.parent.name for p in studies.glob("*/__main__.py")]
    assert len(names) == 13 and all(f"\n## {name}\n" in page for name in names)
    shown = re.findall(r"!\[[^\]]*\]\((studies/[^)]+\.svg)\)", page)
    assert len(shown) >= 13 and all((ROOT / "docs" / path).is_file() for path in shown)
    assert "**fails**" not in page  # every gate of the results on the page holds


def test_the_page_of_metrics_is_current():
    tables = script("make_metrics")
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.filled(page) == page, "run python scripts/make_metrics.py"
