"""Files read strictly: every defect is one line with file and line number."""

import gzip
import json

import pytest

from jaxllm.core.types import UserError
from jaxllm.data import hub, text
from tests.conftest import shared_data

ROWS = [{"text": "one\u2028two\u0085three"}, {"text": "two \U0001f600\0", "n": [1, None, {"k": 2.5}]}]
LINES = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS)


def put(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("bom.jsonl", "\ufeff" + LINES),
        ("blank.jsonl", "\n  \n" + LINES.replace("\n", "\r\n\n")),
        ("unfinished.jsonl", LINES.rstrip("\n")),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),  # the bytes are the test's name: every worker has the same
        ("array.json", json.dumps(ROWS, indent=1)),
        ("lines.json", LINES),
        ("bom.json", "\ufeff" + json.dumps(ROWS)),
    ],
)
def test_rows(tmp_path, name, content):
    path = put(tmp_path / name, content)
    assert text.read_rows(path) == ROWS
    assert text.read_text(path) == [r["text"] for r in ROWS]


def test_parquet_saved_datasets_and_directories(tmp_path):
    import datasets
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": "a", "n": 1}, {"text": "b", "n": 2}]
    (tmp_path / "files").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "files" / "b.parquet")
    assert text.read_rows(tmp_path / "files" / "b.parquet") == rows
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "one")
    assert text.read_rows(tmp_path / "one") == rows
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows[:1])}).save_to_disk(tmp_path / "dict")
    assert text.read_text(tmp_path / "dict") == ["a"]
    with pytest.raises(UserError, match="no split 'test'; there are train"):
        text.read_text(tmp_path / "dict", split="test")
    put(tmp_path / "files" / "a.txt", "plain\n")
    put(tmp_path / "files" / ".hidden.txt", "no")
    assert text.read_text(tmp_path / "files") == ["plain\n", "a", "b"]
    assert text.read_rows(tmp_path / "files") == rows
    put(tmp_path / "bad.parquet", "PAR1 not")
    with pytest.raises(UserError, match="bad.parquet: not a readable parquet file"):
        text.read_rows(tmp_path / "bad.parquet")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}\n{"a": 1,}\n', r"x\.jsonl:2:9: malformed JSON"),
        ('{"a": 1}\n\n{"a": "open\n', r"x\.jsonl:3:\d+: malformed JSON .*near"),
        ('{"a": 1} {"b": 2}\n', r"x\.jsonl:1:10: malformed JSON \(Extra data\)"),
        ("[1, 2]\n", r"x\.jsonl:1: a JSON object .*found \[1, 2\]"),
        ("null\n", r"x\.jsonl:1: a JSON object .*found None"),
        ('\n{"a": NaN}\n', r"x\.jsonl:2: NaN is not JSON"),
        ('{"a": [-Infinity]}\n', r"x\.jsonl:1: -Infinity is not JSON"),
        ('{"a": {"b": 1, "b": 2}}\n', r"x\.jsonl:1: the key 'b' stands twice"),
        ('{"a": "\\ud800"}\n', r"x\.jsonl:1: a lone surrogate \\ud800"),
        (b'{"a": 1}\n{"a": "\xff"}\n', r"x\.jsonl:2: not UTF-8 \(byte 0xff at 8\)"),
        ("".encode("utf-16"), r"x\.jsonl:1: not UTF-8"),
        ('{"a": ' + "9" * 5000 + "}\n", r"x\.jsonl:1: Exceeds the limit"),
        ("", r"x\.jsonl: empty"),
        ("\n \n\ufeff"[:2], r"x\.jsonl: empty"),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path, content, message):
    path = put(tmp_path / "x.jsonl", content)
    with pytest.raises(UserError, match=message) as caught:
        text.read_rows(path)
    assert len(str(caught.value)) - len(str(path)) < 200 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1},\n {"a": 2,}]', r"x\.json:2:10: malformed JSON"),
        ('[{"a": 1}\n {"a": 2}]', r"x\.json:2: malformed JSON: ','"),
        ('[{"a": 1},\n\n {"a": NaN}]', r"x\.json:3: NaN"),
        ('[{"a": 1},\n 3]', r"x\.json:2: a JSON object .*found 3"),
        ('[{"a": 1}', r"x\.json:1: malformed JSON"),
        ('[{"a": 1},', r"x\.json:1: malformed JSON"),
        ('[{"a": 1}]\n[]', r"x\.json:2: malformed JSON: the array must end"),
        ("[]", r"x\.json: empty"),
        (b'[{"a":\n "\xe9"}]', r"x\.json:2: not UTF-8 \(byte 0xe9 at 3\)"),
    ],
)
def test_bad_json_arrays(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        text.read_rows(put(tmp_path / "x.json", content))


def test_deep_nesting_and_endless_lines(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"x\.jsonl:2: JSON nested too deep"):
        text.read_rows(put(tmp_path / "x.jsonl", '{"a": 1}\n{"a": ' + "[" * 200_000 + "]" * 200_000 + "}\n"))
    monkeypatch.setattr(text, "MAX_LINE", 2**20)
    with pytest.raises(UserError, match=r"y\.jsonl:1: a line of more than 1 MiB"):
        text.read_rows(put(tmp_path / "y.jsonl", '{"a": "' + "x" * 2**20 + '"}\n'))


def test_missing_and_unknown_files(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jsonl: no such file or directory$"):
        text.read_rows(tmp_path / "nowhere.jsonl")
    put(tmp_path / "train.jsonl", LINES)
    with pytest.raises(UserError, match=r"trian\.jsonl: no such file .*did you mean train\.jsonl"):
        text.read_rows(tmp_path / "trian.jsonl")
    with pytest.raises(UserError, match=r"x\.csv: unknown kind of file; .*\.jsonl"):
        text.read_rows(put(tmp_path / "x.csv", "a,b"))
    with pytest.raises(UserError, match=r"x\.txt: unknown kind"):
        text.read_rows(put(tmp_path / "x.txt", "a"))
    (tmp_path / "d").mkdir()
    with pytest.raises(UserError, match=r"d: a directory without any .*\.parquet"):
        text.read_rows(tmp_path / "d")
    with pytest.raises(UserError, match=r"t\.jsonl\.gz: cannot be read"):
        text.read_rows(put(tmp_path / "t.jsonl.gz", gzip.compress(LINES.encode() * 50)[:-20]))
    with pytest.raises(UserError, match=r"n\.jsonl\.gz: cannot be read"):
        text.read_rows(put(tmp_path / "n.jsonl.gz", LINES))


def test_a_missing_column_names_those_that_are_there(tmp_path):
    path = put(tmp_path / "x.jsonl", '{"body": "b", "text": "t"}\n{"body": "c", "id": 1}\n')
    assert text.read_text(path, column="body") == ["b", "c"]
    with pytest.raises(UserError, match=r"x\.jsonl:2: no column 'text'; there are 'body', 'id'"):
        text.read_text(path)
    put(path, '{"text": "t"}\n{"text": null}\n')
    with pytest.raises(UserError, match=r"x\.jsonl:2: column 'text' must be a string, found None"):
        text.read_text(path)


def test_plain_text(tmp_path):
    assert text.read_text(put(tmp_path / "a.txt", "\ufeffone\n\ntwo\u2028")) == ["one\n\ntwo\u2028"]
    with pytest.raises(UserError, match=r"b\.txt:2: not UTF-8 \(byte 0xe9 at 4\)"):
        text.read_text(put(tmp_path / "b.txt", b"ok\ncaf\xe9\n"))
    with pytest.raises(UserError, match=r"c\.md: empty"):
        text.read_text(put(tmp_path / "c.md", " \n"))


def test_a_dataset_by_name_without_a_network_is_one_clear_error(monkeypatch):
    import datasets

    def broken(name, config, split):
        raise ConnectionError(f"Couldn't reach {name}\n(config {config}, split {split})")

    with pytest.raises(UserError, match=r"hf:owner/name:main: offline, and not in the cache: pass a local path") as caught:
        text.read_rows("hf:owner/name:main")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(datasets, "load_dataset", broken)
    monkeypatch.setattr(hub, "_reachable", lambda name: True)
    with pytest.raises(UserError, match=r"hf:owner/name:main: .*Couldn't reach owner/name.*or give the path") as caught:
        text.read_rows("hf:owner/name:main")
    assert "\n" not in str(caught.value)


def test_a_dataset_by_name(monkeypatch):
    import datasets

    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"text": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert text.read_text("hf:owner/name", split="test") == ["a"]
    assert asked == [("owner/name", None, "test")]


def test_split_by_hash():
    documents = [f"document {i}" for i in range(4000)]
    train, held_out = text.split_by_hash(documents, held_out=0.05)
    assert 140 < len(held_out) < 260 and sorted(train + held_out) == sorted(documents)
    again = text.split_by_hash(documents[::-1] + ["one more"], held_out=0.05)
    assert set(held_out) <= set(again[1])
    assert text.split_by_hash(documents, held_out=0) == (documents, [])
    assert text.split_by_hash(["twice", "twice"]) in ((["twice"] * 2, []), ([], ["twice"] * 2))
    with pytest.raises(UserError, match="held_out 1.5"):
        text.split_by_hash(documents, held_out=1.5)


def test_one_long_text_has_a_held_out_part_and_loses_nothing():
    document = "\n\n".join(f"paragraph {i} " + "word " * 80 for i in range(400))
    train, held_out = text.split_by_hash([document], held_out=0.1)
    parts = train + held_out
    assert train and held_out and sum(map(len, parts)) == len(document) and all(p in document for p in parts)
    assert "".join(text._parts(document)) == document and min(map(len, parts)) >= 2000
    assert sorted(sum(text.split_by_hash(["a\n\nb", "c"]), [])) == ["a\n\nb", "c"]


def test_blank_documents_are_passed_over(tmp_path):
    assert text.read_text(put(tmp_path / "a.jsonl", '{"text": " "}\n{"text": "a"}\n')) == ["a"]
    with pytest.raises(UserError, match=r"b\.jsonl: empty: every document"):
        text.read_text(put(tmp_path / "b.jsonl", '{"text": ""}\n'))


def test_escaped_pairs_of_surrogates_are_text(tmp_path):
    assert text.read_rows(put(tmp_path / "a.jsonl", '{"text": "\\ud83d\\ude00"}\n')) == [{"text": "\U0001f600"}]


def test_real_files_are_read():
    assert len(text.read_rows(shared_data("math/gsm8k.train.jsonl"))) == 7473
    assert set(text.read_rows(shared_data("preference/hh_harmless_base.jsonl.gz"))[0]) == {"chosen", "rejected"}
    assert len(text.read_text(shared_data("math/gsm8k.train.jsonl"), column="question")) == 7473
    train, held_out = text.split_by_hash(text.read_text(shared_data("text/tinyshakespeare.txt")), held_out=0.05)
    assert 0.02 < sum(map(len, held_out)) / sum(map(len, train + held_out)) < 0.09
