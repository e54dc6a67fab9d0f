"""The recipes work: their blocks are executed in order, each as the file that its first line names, and their tests called.

`# PATH` is a new file, `# at the end of PATH` are lines that the reader adds to a file of the repository.
"""

import importlib
import inspect
import re
import sys
import types

import pytest

from jaxllm import settings
from tests.conftest import ROOT

BLOCK = re.compile(r"```python\n# (?P<added>at the end of )?(?P<path>[\w/]+\.py)\n(?P<code>.*?)```", re.DOTALL)
RECIPES = sorted((ROOT / "docs" / "recipes").glob("*.md"))


def name_of(path):
    return path.removesuffix(".py").replace("/", ".")


def added(path, code, monkeypatch):
    """The block's lines behind those of a module that is there: its names are as the lines leave them, until the test ends."""
    module = importlib.import_module(name_of(path).removesuffix(".__init__"))
    names = [name for name in vars(module) if not name.startswith("__")]
    after = {name: dict(value) if type(value := vars(module)[name]) is dict else value for name in names}
    exec(compile(code, f"{path} (of a recipe)", "exec"), after)  # noqa: S102 the repository's own page
    for name in [name for name in after if not name.startswith("__")]:
        monkeypatch.setattr(module, name, after[name], raising=False)


def as_module(path, code, monkeypatch):
    """The block as the module that `import` would find at its path."""
    name = name_of(path)
    assert not (ROOT / path).exists(), f"{path} is there already: a recipe adds a file"
    module = types.ModuleType(name)
    parent, _, leaf = name.rpartition(".")
    monkeypatch.setitem(sys.modules, name, module)
    if parent in sys.modules:
        monkeypatch.setattr(sys.modules[parent], leaf, module, raising=False)
    exec(compile(code, f"{path} (of a recipe)", "exec"), module.__dict__)  # noqa: S102 the repository's own page
    return module


def call_tests(module, tmp_path):
    """How many tests the module has; each gets a directory of its own if it asks for one."""
    tests = [fn for name, fn in vars(module).items() if name.startswith("test_")]
    for fn in tests:
        own = tmp_path / fn.__name__
        own.mkdir()
        fn(**({"tmp_path": own} if "tmp_path" in inspect.signature(fn).parameters else {}))
    return len(tests)


@pytest.mark.parametrize("page", RECIPES, ids=lambda page: page.stem)
def test_the_blocks_of_a_recipe_run_and_its_tests_pass(page, tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "CONFIGS", tmp_path / "configs")
    text = page.read_text(encoding="utf-8")
    blocks, called = list(BLOCK.finditer(text)), 0
    assert len(blocks) == text.count("```python") >= 3, "every block names its file"
    assert max(map(len, "\n".join(block["code"] for block in blocks).splitlines())) <= 130, "ruff would complain"
    for block in blocks:
        path, code = block["path"], block["code"]
        if path.startswith("configs/"):
            (tmp_path / path).parent.mkdir(parents=True)
            (tmp_path / path).write_text(code, encoding="utf-8")
        if block["added"]:
            added(path, code, monkeypatch)
        else:
            called += call_tests(as_module(path, code, monkeypatch), tmp_path)
    assert called


def test_there_are_recipes_for_a_loss_a_model_and_a_study():
    assert [page.stem for page in RECIPES] == ["add_a_loss", "add_a_model", "add_a_study"]
