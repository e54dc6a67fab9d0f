"""The site builds without a warning, loads nothing from elsewhere, and what pages tell people to type is understood."""

import re
import shlex
import subprocess
import sys

import pytest

from jaxllm import settings
from tests.conftest import ROOT

# a recipe's commands are for what the reader adds
PAGES = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").rglob("*.md")) if p.parent.name != "recipes")]


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("myst_nb")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-E", "-d", str(tmp_path / "trees"), "docs", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"<(script|img|iframe)[^>]+src=\"(https?:)?//|<link[^>]+href=\"(https?:)?//", text), page
    assert "<math" in (tmp_path / "site" / "notebooks" / "01_life_cycle.html").read_text(encoding="utf-8")


def commands():
    """(page, experiment, words) of every `python -m experiments.x ...` in the pages."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for found in re.finditer(r"python -m experiments\.([\w.]+\w)(?![\w.<])([^`\n|;#&]*)", text):
            yield page.relative_to(ROOT), found[1], found[2]


def words_of(text):
    """The arguments of a command in a page; what stands for the reader's own (`<run>`, DIR) is a word like any other."""
    return [word for word in shlex.split(text.replace("(", "").replace(")", ""), comments=True) if word.startswith("--")]


def test_every_setting_in_a_command_of_the_pages_exists():
    seen, wrong = 0, []
    for page, name, text in commands():
        if not settings.config_path(name).is_file():  # a tool
            places = (f"{name}.py", f"{name}/__main__.py")
            wrong += [] if any((ROOT / "experiments" / place).is_file() for place in places) else [(str(page), name)]
            continue
        items = [word.lstrip("-").partition("=") for word in words_of(text)]
        file, _, variant = next((value for key, _, value in items if key == "config"), "").partition(":")
        path = ROOT / file if file else settings.config_path(name)
        config = settings.load_config(path, variant if re.fullmatch(r"[\w.-]+", variant) else None)
        said = [(key, value) for key, _, value in items if key.startswith("config.") and not re.fullmatch("[A-Z]+", value)]
        over = {key.removeprefix("config."): value for key, value in said}
        wrong += [(str(page), name, error) for error in settings.check_overrides(config, over)[1]]
        seen += 1
    assert not wrong and seen > 50
