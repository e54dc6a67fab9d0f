"""The tutorial shows an output for every command, and its script writes what commands print."""

import importlib.util

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def tool():
    found = importlib.util.spec_from_file_location("make_tutorial", ROOT / "scripts" / "make_tutorial.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_every_block_has_its_output(tool):
    page = tool.PAGE.read_text(encoding="utf-8")
    blocks = [match[0] for match in tool.BLOCK.finditer(page)]
    assert len(blocks) == page.count("```console") + page.count("```python") > 10
    outputs = [block.split("```text\n")[-1] if block.startswith("```python") else block.split("\n", 2)[2] for block in blocks]
    assert all(len(output.removesuffix("```").strip()) > 10 for output in outputs)
    assert "is finished: nothing to do" not in page and "Traceback" not in page


def test_commands_run_in_the_work_directory_and_their_output_replaces_the_old(tool, tmp_path):
    (tmp_path / "here.txt").write_text("new & true")
    page = "a\n```console\n$ cat here.txt\n{}\n```\nb"
    assert tool.filled(page.format("old"), tmp_path) == page.format("new & true")


def test_a_command_that_fails_ends_the_script_with_its_output(tool, tmp_path):
    with pytest.raises(SystemExit, match="ended with 3:\nwhy"):
        tool.filled("```console\n$ echo why; exit 3\n```", tmp_path)


def test_long_outputs_keep_both_ends(tool):
    kept = tool.shortened("\n".join(map(str, range(50)))).splitlines()
    assert kept[:6] == ["0", "1", "2", "3", "4", "5"] and kept[6] == "..." and kept[-1] == "49"
    assert tool.shortened("x" * 200).endswith(" ...") and len(tool.shortened("x" * 200)) == tool.WIDTH
