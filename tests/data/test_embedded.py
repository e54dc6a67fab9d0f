"""The embedded text: real, distinct, in a fixed order, and prose that code does not repeat."""

import ast
import sysconfig
from pathlib import Path

import pytest

from jaxllm.core.types import UserError
from jaxllm.data import embedded, text


@pytest.fixture(scope="module")
def parts():
    return text.embedded_prose(), text.embedded_code()


def test_there_is_enough_for_the_quickstart(parts):
    prose, code = parts
    assert sum(map(len, prose)) > 1_500_000 and sum(map(len, code)) > 3_000_000
    assert sum("the" in d.split() for d in prose) > len(prose) / 3


def test_no_document_stands_twice(parts):
    documents = [" ".join(d.split()) for part in parts for d in part]
    assert len(set(documents)) == len(documents)


def test_the_order_is_fixed_and_the_whole_mixes_both(parts):
    prose, code = parts
    everything = text.embedded()
    assert sorted(everything) == sorted(prose + code)
    assert everything == embedded._in_order(reversed(prose + code)) and text.embedded_prose() == prose
    first = set(everything[: len(everything) // 4])
    assert first & set(code) and first & set(prose)


def test_code_does_not_repeat_the_prose(parts):
    prose, code = parts
    joined = "\n".join(code)
    assert not [d for d in [p for p in prose if len(p) > 200][:500] if d in joined]


def test_code_parses_without_its_docstrings(parts):
    for source in parts[1][:60]:
        assert not ast.get_docstring(ast.parse(source))


def test_a_split_file_is_prose_and_a_program(tmp_path):
    path = tmp_path / "m.py"
    f = '# About f,\n# at length.\ndef f(x):\n    """Docs\n    of f."""\n    return "#"\n\n'
    path.write_text('"""Module."""\n' + f + 'class E(Exception):\n    """Only docs."""\n')
    prose, code = embedded._split(path)
    assert prose == ["Module.", "Docs\nof f.", "Only docs.", "About f,\nat length."]
    assert [type(n).__name__ for n in ast.parse(code).body] == ["FunctionDef", "ClassDef"]
    assert 'return "#"' in code and "About" not in code and "Docs" not in code


def test_tables_and_commented_code_are_no_english():
    assert embedded._is_english("Return the number of words in a text that is long enough.")
    assert not embedded._is_english("x = [1, 2, 3] + {4: 5} ** -6; y(x) -> z; a[b] = c | d & (e ^ f) ** g_h")
    assert not embedded._is_english("too short")


def test_tests_and_other_packages_are_left_out(parts):
    root = Path(sysconfig.get_path("stdlib"))
    assert {"test", "site-packages"} <= embedded.SKIP
    assert any((root / name).is_dir() for name in embedded.SKIP)
    assert not any("unittest.main()" in d and "class Test" in d and "self.assertEqual" in d for d in parts[1])


def test_a_stripped_python_says_what_to_give(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    embedded._texts.cache_clear()
    with pytest.raises(UserError, match="stripped Python.*config.data.path"):
        text.embedded()
    embedded._texts.cache_clear()
