"""Reading documents and rows: every bad input is one line that names the file, the line and the value."""

import gzip
import json

import numpy as np
import pytest

from jaxllm.core.types import UserError
from jaxllm.data import text
from tests.conftest import shared_data


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(call, *args, **more):
    """The message of a UserError, which is one line."""
    with pytest.raises(UserError) as error:
        call(*args, **more)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_text_file_is_one_document_with_its_line_ends(tmp_path):
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\n\r\ntwo\xe2\x80\xa8three\n")
    assert text.read_text(path) == ["one\r\n\r\ntwo\u2028three\n"]


def test_a_directory_is_read_in_the_order_of_names(tmp_path):
    write(tmp_path / "b.md", "second")
    write(tmp_path / "a.txt", "first")
    write(tmp_path / "c.jsonl", '{"text": "third"}\n')
    write(tmp_path / "z.bin", b"\x00\xff")
    assert text.read_text(tmp_path) == ["first", "second", "third"]


def test_only_a_line_feed_ends_a_row(tmp_path):
    rows = [{"text": "a\u2028b\u0085c"}, {"text": "d"}]
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    assert text.read_rows(write(tmp_path / "a.jsonl", lines)) == rows


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_rows_of_every_kind_of_file_are_the_same(tmp_path, name):
    rows = [{"messages": [{"role": "user", "content": "hi"}], "n": 1}, {"messages": [], "n": None}]
    path = tmp_path / name
    if name == "a.parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        content = json.dumps(rows) if name == "a.json" else "\n\n".join(map(json.dumps, rows))
        path.write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
    assert text.read_rows(path) == rows


def test_a_bom_and_blank_lines_are_no_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')
    assert [r["text"] for r in text.read_rows(path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": "a"', "malformed JSON at column"),
        ('{"text": NaN}', "NaN"),
        ('{"text": -Infinity}', "-Infinity"),
        ('{"text": "a", "text": "b"}', "key 'text' stands twice"),
        ('{"text": "\\ud800"}', "lone surrogate"),
        ("[1]", "a JSON list, not an object"),
        ("null", "not an object"),
        (b'{"text": "\xff"}', "not UTF-8: byte 10 is 0xff"),
        ("[" * 200_000, "nested too deeply"),
        ('{"n": ' + "9" * 5000 + "}", "limit"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, says):
    line = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path / "a.jsonl", b'{"text": "good"}\n\n' + line + b"\n")
    message = refusal(text.read_rows, path)
    assert f"{path}:3" in message and says in message, message


def test_a_line_without_end_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "LONGEST", 100)
    path = write(tmp_path / "a.jsonl", '{"text": "' + "a" * 200 + '"}\n')
    assert f"{path}:1 is over 100 bytes" in refusal(text.read_rows, path)


def test_escaped_pairs_of_surrogates_are_text(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "\\ud83d\\ude00"}\n')
    assert text.read_rows(path) == [{"text": "\U0001f600"}]


def test_a_missing_column_names_those_that_are_there(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"txt": "b", "n": 1}\n')
    message = refusal(text.read_text, path)
    assert f"{path}:2: column 'text' is not among txt, n" in message and "'txt'" in message
    path = write(tmp_path / "b.jsonl", '{"text": null}\n')
    assert "column 'text' is None, not text" in refusal(text.read_text, path)


def test_another_column_can_be_read(tmp_path):
    assert text.read_text(write(tmp_path / "a.jsonl", '{"body": "a"}\n'), column="body") == ["a"]


def test_empty_documents_are_skipped_and_empty_files_refused(tmp_path):
    assert text.read_text(write(tmp_path / "a.jsonl", '{"text": ""}\n{"text": "a"}\n')) == ["a"]
    for name in ("b.txt", "b.jsonl", "b.json"):
        path = write(tmp_path / name, " \n")
        assert str(path) in refusal(text.read_text, path)
    assert "has no rows" in refusal(text.read_rows, tmp_path / "b.jsonl")


def test_missing_and_unknown_files_are_named_with_a_way_out(tmp_path):
    write(tmp_path / "train.jsonl", "{}")
    assert "Did you mean" in refusal(text.read_rows, tmp_path / "trian.jsonl")
    assert "unknown kind" in refusal(text.read_rows, write(tmp_path / "a.xlsx", b"1"))
    (tmp_path / "empty").mkdir()
    assert "no file that can be read" in refusal(text.read_rows, tmp_path / "empty")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz", "a.parquet"])
def test_damaged_files_are_named(tmp_path, name):
    path = write(tmp_path / name, gzip.compress(b'{"text": "a"}' * 50)[:30])
    assert str(path) in refusal(text.read_text, path)


def test_bytes_that_are_not_text_are_named(tmp_path):
    path = write(tmp_path / "a.txt", b"ab\xff")
    assert "byte 2 is 0xff" in refusal(text.read_text, path)


def test_saved_datasets_are_read_by_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = {name: datasets.Dataset.from_list([{"text": x}]) for name, x in (("train", "a"), ("test", "b"))}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "d"))
    parts["train"].save_to_disk(str(tmp_path / "one"))
    assert text.read_text(tmp_path / "d") == ["a"]
    assert text.read_text(tmp_path / "d", split="test") == ["b"]
    assert text.read_rows(tmp_path / "one") == [{"text": "a"}]
    assert "it has train, test" in refusal(text.read_text, tmp_path / "d", split="valid")


def test_an_unreachable_name_says_to_give_a_local_path():
    assert "give a local path" in refusal(text.read_text, "hf:nobody/nothing-here")


def test_a_document_keeps_its_side_when_others_come_or_go():
    documents = [f"document {i}" for i in range(4000)]
    train, held_out = text.split_by_hash(documents, held_out=0.1)
    assert sorted(train + held_out) == sorted(documents)
    assert 330 < len(held_out) < 470
    again_train, again_held_out = text.split_by_hash(documents[::-1][:2000], held_out=0.1)
    assert set(again_train) <= set(train) and set(again_held_out) <= set(held_out)


def test_one_long_text_is_cut_at_blank_lines_and_loses_nothing():
    document = "\n\n".join(f"paragraph {i} " + "word " * 80 for i in range(400))
    train, held_out = text.split_by_hash([document], held_out=0.1)
    assert held_out and train and set(train).isdisjoint(held_out)
    parts = train + held_out
    assert sum(map(len, parts)) == len(document) and all(p in document for p in parts)
    assert min(map(len, parts)) >= 2000


def test_short_texts_stay_whole():
    assert sorted(sum(text.split_by_hash(["a\n\nb", "c"]), [])) == ["a\n\nb", "c"]


def test_real_rows_are_read_whole():
    rows = text.read_rows(shared_data("math/gsm8k.train.jsonl"))
    assert len(rows) == 7473 and set(rows[0]) == {"question", "answer"}
    assert len(text.read_rows(shared_data("preference/hh_harmless_base.jsonl.gz"))) == 1800
    assert len(text.read_text(shared_data("text/botchan.txt"))) == 1


def test_real_text_can_be_held_out():
    documents = text.read_text(shared_data("text/tinyshakespeare.txt"))
    train, held_out = text.split_by_hash(documents, held_out=0.05)
    share = np.sum([len(d) for d in held_out]) / np.sum([len(d) for d in train + held_out])
    assert 0.02 < share < 0.09
