"""Malformed files: for every reader no traceback, no hang, bounded memory, nothing overwritten, and the file and line named."""

import hashlib
import json
import os
import re
import subprocess
import sys

import pytest

from jaxllm.core.types import UserError
from jaxllm.data import chat, pack, pairs, text, unpaired
from jaxllm.data.tokenizer import byte_tokenizer
from tests.conftest import ROOT
from tests.data import corpora

BYTES = byte_tokenizer()


def contents(root):
    read = lambda p: hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() and not p.is_symlink() else ""  # noqa: E731
    return {str(p): read(p) for p in root.rglob("*")}


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """({file: what must be said}, {file: what was said}), read by one process that may take 512 MB more than it begins with."""
    root = tmp_path_factory.mktemp("corpora")
    expected = corpora.make(root)
    before = contents(root)
    argv = [sys.executable, "-m", "tests.data.corpora", str(root)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(argv, input=json.dumps(list(expected)), capture_output=True, text=True, env=environ, timeout=240)
    assert done.returncode == 0, f"it ended at file {done.stdout.count(chr(10)) + 1}: {done.stderr[-1000:]}"
    assert contents(root) == before, "a file was changed or made"
    return expected, {row["file"]: row for row in map(json.loads, done.stdout.splitlines())}


def test_every_file_is_read_or_refused_in_one_line(read):
    expected, found = read
    assert found.keys() == expected.keys() and len({name.split("/")[-1] for name in expected}) >= 25
    wrong = {}
    for name, said in expected.items():
        row, error = found[name], found[name].get("error", "")
        if "traceback" in row:
            wrong[name] = row["traceback"]
        elif not said and row.get("rows") != (1 if name in ("cyclic", "locked/rows.jsonl") else 9):
            wrong[name] = row
        elif said and not (re.search(said, error) and name in error and "\n" not in error and len(error) < 500):
            wrong[name] = {**row, "error": error[:500]}
    assert not wrong, json.dumps(wrong, indent=1)


def test_none_takes_long(read):
    slow = {name: row["seconds"] for name, row in read[1].items() if row["seconds"] > 20}  # the slowest takes a second
    assert not slow


# ---- some bad rows among many


def many(tmp_path, bad, rows=200):
    lines = [json.dumps({"prompt": f"say {i}", "completion": "it"}) for i in range(rows)]
    for place, content in bad.items():
        lines[place] = content
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_skipping_leaves_out_one_in_a_hundred(tmp_path):
    path = many(tmp_path, {7: '{"prompt": ', 150: '{"prompt": "a"}'})
    rows, bad = text.checked_rows(path, chat.normalise, on_error="skip")
    assert len(rows) == 198 and rows[7][0]["content"] == "say 8"
    assert len(bad) == 2 and bad[0].startswith(f"{path}:8:11: malformed") and bad[1].startswith(f"{path}:151 ")
    with pytest.raises(UserError, match=r"rows\.jsonl:8:11: malformed.*out 2 of 200 rows with --config.data.on_error=skip\)$"):
        text.checked_rows(path, chat.normalise)


def test_more_bad_rows_are_refused_in_either_way(tmp_path):
    path = many(tmp_path, dict.fromkeys((7, 8, 9), "nothing"))
    for how in ("stop", "skip"):
        with pytest.raises(UserError, match=r"rows\.jsonl:8:1: malformed.*\(3 of 200 rows are bad\)$"):
            text.checked_rows(path, chat.normalise, on_error=how)
    path = many(tmp_path, dict.fromkeys(range(5000), "nothing"), 9000)
    with pytest.raises(UserError, match=r"rows\.jsonl:1:1: .*\(1,001 of 1,001 rows are bad so far\)$"):
        text.checked_rows(path, chat.normalise, on_error="skip")
    with pytest.raises(UserError, match="config.data.on_error='ignore': choose stop or skip"):
        text.checked_rows(path, chat.normalise, on_error="ignore")


def test_what_a_row_calls_itself_cannot_break_the_line(tmp_path):
    path = many(tmp_path, {0: json.dumps({"a\nerror: b\x1b[2J": 1}), 1: json.dumps({"messages": ["\n"]})})
    with pytest.raises(UserError, match=r"rows\.jsonl:1 needs `messages`.* a\\nerror: b\\x1b\[2J"):
        text.checked_rows(path, chat.normalise)


def test_documents_are_skipped_too(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join([json.dumps({"text": f"document {i}"}) for i in range(299)] + ['{"text": 3}']))
    documents, bad = text.checked_text(path, on_error="skip")
    assert len(documents) == 299 and bad[0].startswith(f"{path}:300: column 'text' must be a string")
    assert text.first_row(path) == {"text": "document 0"}


# ---- rows that are well formed and train nothing


@pytest.mark.parametrize("length,said", [(16, "6 of 6 examples have no trained token"), (512, "")])
def test_a_prompt_longer_than_the_context(length, said):
    row = {"prompt": "a prompt that is longer than what there is room for", "completion": "yes", "label": True}
    for report in (
        pack.pack([chat.encode_chat(BYTES, chat.normalise({k: row[k] for k in ("prompt", "completion")}, "r"))] * 6, length)[1],
        pairs.encode_pairs(BYTES, [{"prompt": row["prompt"], "chosen": "yes", "rejected": "no"}] * 6, length)[1],
        unpaired.encode_unpaired(BYTES, [row] * 6, length)[1],
    ):
        if not said:
            pack.check_report(report, "rows.jsonl", BYTES)
            continue
        with pytest.raises(UserError, match=f"{said} .the first is '<.user.>a prompt that"):
            pack.check_report(report, "rows.jsonl", BYTES)
