"""Notebooks as files: stripped, badges current, one install line, what Colab reads, and cells that parse. CI executes them."""

import ast
import importlib.util
import json

import pytest

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def stamp():
    found = importlib.util.spec_from_file_location("stamp_notebooks", ROOT / "scripts" / "stamp_notebooks.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def cells(path, kind):
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [(cell, "".join(cell["source"])) for cell in found if cell["cell_type"] == kind]


def test_there_are_three():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03"]


@every
def test_outputs_are_stripped_and_no_sign_is_an_emoji(path):
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell, _ in cells(path, "code"))
    assert all(ord(sign) < 0x2190 for sign in path.read_text(encoding="utf-8"))


@every
def test_badges_and_links_are_the_repository_s(path):
    text, tool = path.read_text(encoding="utf-8"), stamp()
    assert tool.stamped(text) == text, "run python scripts/stamp_notebooks.py"
    _, first = cells(path, "markdown")[0]
    for site in (
        "colab.research.google.com/github/",
        "kaggle.com/kernels/welcome?src=https://github.com/",
        "](https://github.com/",
    ):
        assert f"{site}{tool.repository()}/blob/main/notebooks/{path.name})" in first


def test_an_address_is_written_wherever_the_old_one_was(monkeypatch):
    tool = stamp()
    monkeypatch.setattr(tool, "repository", lambda: "someone/name")
    before = "colab.research.google.com/github/OWNER/jaxllm/blob/main/a https://github.com/OWNER/jaxllm/blob/main/b "
    before += 'git+https://github.com/OWNER/jaxllm\\"'
    assert tool.stamped(before) == before.replace("OWNER/jaxllm", "someone/name")


@every
def test_colab_gets_its_accelerator_and_one_install_line(path):
    meta = json.loads(path.read_text(encoding="utf-8"))["metadata"]
    assert meta["accelerator"] == "TPU" and meta["colab"]["gpuType"] == "V5E1" and meta["colab"]["name"] == path.name
    code = [text for _, text in cells(path, "code")]
    assert sum(text.count("%pip install -q") for text in code) == 1 == sum(text.count("pip install") for text in code)
    assert sum("chips.print_device_check(" in text for text in code) == 1


@every
def test_cells_parse_and_the_size_for_ci_is_there(path):
    code = [text for _, text in cells(path, "code")]
    for text in code:
        ast.parse(text.replace("%pip install -q", "_ ="))
    assert any('"ci": (' in text and "JAXLLM_NOTEBOOK_SIZE" in text for text in code)
