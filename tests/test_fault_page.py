"""The page of faults names tests that exist, and every fault has one."""

import ast
import re

import pytest

from tests.conftest import ROOT

ROWS = [line.split("|")[1:-1] for line in (ROOT / "docs" / "faults.md").read_text().splitlines() if re.match(r"\| \d+ \|", line)]
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")


def functions(path):
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip())
def test_the_tests_of_a_fault_exist(row):
    number, fault, happens, held = (cell.strip() for cell in row)
    named = NAMED.findall(held)
    assert named and len(named) == held.count("`") / 2 and fault and happens
    missing = [f"{path}::{name}" for path, name in named if name not in functions(ROOT / path)]
    assert not missing


def test_every_fault_stands_once():
    assert [int(row[0]) for row in ROWS] == list(range(1, 39))
