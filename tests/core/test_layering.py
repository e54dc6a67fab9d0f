"""The star: folders of jaxllm import only core and themselves; and the house measures, from the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "jaxllm"
TOP = {"launch", "exits", "settings", "cluster", "ranges"}  # the top-level modules that join folders
# what comes out of a published file is a model of ours, and that is a function of models/ alone
ALSO = {"convert": {"models"}}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(source: str) -> list[str]:
    """Every imported module, those inside functions too; `from jaxllm import x` counts as jaxllm.x."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide arrows"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def arrows(folder: str, source: str) -> list[str]:
    """The imports of a file of jaxllm/<folder>/ that the layering forbids. folder '' is the top level."""
    bad = []
    for name in imported(source):
        parts = name.split(".")
        if parts[0] in ("experiments", "configs", "tests", "notebooks", "benchmarks"):
            bad.append(name)
        if parts[0] != "jaxllm" or folder == "":
            continue
        if len(parts) < 2 or parts[1] not in {"core", folder, *ALSO.get(folder, ())}:
            bad.append(name)
    return bad


def folder_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def test_folders_import_only_core_and_themselves():
    bad = {str(p.relative_to(ROOT)): found for p in FILES if (found := arrows(folder_of(p), p.read_text()))}
    assert not bad, f"forbidden imports (see the layering in the docs): {bad}"
    assert {p.stem for p in PACKAGE.glob("*.py")} <= TOP | {"__init__"}


@pytest.mark.parametrize(
    "folder,line,bad",
    [
        ("losses", "from jaxllm.models import decoder", True),
        ("core", "import jaxllm.models.decoder", True),
        ("train", "def f():\n    from jaxllm import launch", True),
        ("data", "import experiments.sft", True),
        ("", "from configs import sft", True),
        ("losses", "from jaxllm.core import ops\nfrom jaxllm.losses import lm\nimport jax", False),
        ("", "from jaxllm.models import decoder", False),
        ("convert", "from jaxllm.models import families", False),
        ("convert", "from jaxllm.data import tokenizer", True),
        ("models", "from jaxllm.convert import hf", True),
    ],
)
def test_the_layering_test_can_fail(folder, line, bad):
    assert bool(arrows(folder, line)) == bad


def test_core_stays_small():
    files = [p for p in (PACKAGE / "core").glob("*.py") if p.name != "__init__.py"]
    lines = sum(len(p.read_text().splitlines()) for p in files)
    assert len(files) <= 6 and lines <= 900, f"core has {len(files)} modules and {lines} lines"


def test_no_file_over_400_lines():
    long = {str(p.relative_to(ROOT)): n for p in FILES if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_no_function_over_60_lines():
    long = {}
    for path in FILES + sorted((ROOT / "experiments").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (n := node.end_lineno - node.lineno + 1) > 60:
                long[f"{path.relative_to(ROOT)}:{node.name}"] = n
    assert not long


def test_classes_are_records_without_inheritance():
    """Only NamedTuple and exceptions are bases; every other class is decorated as a dataclass. Flax asks its own of modules."""
    bad = []
    for path in FILES:
        for node in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ClassDef)):
            bases = {ast.unparse(b) for b in node.bases}
            record = any("dataclass" in ast.unparse(d) for d in node.decorator_list)
            if bases - {"NamedTuple", "Exception", "linen.Module", "nnx.Module"} or not (bases or record):
                bad.append(f"{path.relative_to(ROOT)}:{node.name}({', '.join(bases)})")
    assert not bad
