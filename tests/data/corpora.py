"""Malformed data files, written anew for each test; run as a program it reads them under limits and says what came out.

    python -m tests.data.corpora ROOT        # one JSON line a file: {"file", "rows" or "error", "traceback", "seconds"}

Of every kind of row there is a file for each defect: nine good rows, the third of which is made bad.
"""

from __future__ import annotations

import gzip
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

GOOD = {
    "text": {"text": "a plain text"},
    "messages": {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    "completion": {"prompt": "hi", "completion": "ho"},
    "pairs": {"prompt": "hi", "chosen": "ho", "rejected": "no"},
    "unpaired": {"prompt": "hi", "completion": "ho", "label": True},
    "ranked": {"prompt": "hi", "ranked": ["a", "b", "c"]},
    "problems": {"question": "2 and 3?", "answer": "5"},
    "labelled": {"text": "good film", "label": "good"},
    "pictures": {"pixels": [0, 1, 2, 3], "label": 1},
}
# separators, right to left, zero width, four bytes
ODD = "\u2028 and \u0085 and \u05e9\u05dc\u05d5\u05dd \u200b\u200d \U0001f600 \x7f"
AT = 3  # the line that is bad
HEAVY = ("text", "messages")  # the kinds that get the large files


def line(row: dict) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


def defects(kind: str) -> Iterator[tuple[str, bytes, str]]:
    """(name, the bytes of the bad line, what must be said; "" where the row is good)."""
    good = GOOD[kind]
    last = list(good)[-1]
    whole = line(good)
    other = GOOD["pairs" if kind not in ("pairs", "unpaired", "ranked", "text") else "problems"]
    yield "cut_off", whole[: len(whole) // 2], ":3:.*malformed JSON"
    yield "missing_column", line({"unheard_of": 1}), ":3|row 3"
    yield "wrong_type", line({**good, last: {}}), ":3|row 3"
    yield "null", line({**good, last: None}), ":3|row 3"
    yield "not_an_object", b"[1, 2]", ":3: a JSON object"
    yield "nan", b'{"x": NaN, ' + whole[1:], ":3: NaN is not JSON"
    yield "infinite", b'{"x": 1e999, ' + whole[1:], ":3: 1e999 is too large for a number"
    yield "twice", b'{"x": 1, "x": 2, ' + whole[1:], ":3: the key 'x' stands twice"
    yield "latin1", b'{"x": "caf\xe9", ' + whole[1:], ":3: not UTF-8 .byte 0xe9"
    yield "surrogate", b'{"x": "\\ud800", ' + whole[1:], ":3: a lone surrogate"
    yield "raw_nul", b'{"x": "\x00", ' + whole[1:], ":3:.*malformed JSON"
    yield "escaped_nul", b'{"x": "\\u0000", ' + whole[1:], ""
    yield "odd_characters", line({**good, "x": ODD}), ""
    yield "digits", b'{"x": ' + b"9" * 5000 + b", " + whole[1:], ":3: Exceeds the limit"
    yield "deep", b'{"x": ' + b"[" * 200_000 + b"]" * 200_000 + b", " + whole[1:], ":3: JSON nested too deep"
    yield "columns", line({**{f"c{i}": i for i in range(20_000)}, **good}), ""
    yield "other_schema", line(other), ":3|row 3"
    if kind in HEAVY:
        yield "endless", b'{"x": "' + b"x" * 50_000_000 + b'", ' + whole[1:], ":3: a line of more than 32 MiB"


def whole_files(kind: str) -> Iterator[tuple[str, bytes, str]]:
    """(file name, its bytes, what must be said)."""
    lines = b"\n".join([line(GOOD[kind])] * 9)
    yield "byte_order_mark.jsonl", b"\xef\xbb\xbf" + lines, ""
    yield "crlf.jsonl", lines.replace(b"\n", b"\r\n") + b"\r\n", ""
    yield "blank_lines.jsonl", b"\n \n" + lines.replace(b"\n", b"\n\n\t\n"), ""
    yield "empty.jsonl", b"", "empty"
    yield "blank.jsonl", b"\n \r\n\t\n", "empty"
    yield "utf16.jsonl", lines.decode().encode("utf-16"), ":1: not UTF-8"
    yield "truncated.jsonl.gz", gzip.compress(lines + os.urandom(4000))[:-700], "cannot be read|not UTF-8"
    yield "not_packed.jsonl.gz", lines, "cannot be read"
    yield "bomb.jsonl.gz", gzip.compress(b'{"x": "' + b" " * 2**26, 1), ":1: a line of more than 32 MiB"
    yield "array_breaks_off.json", b"[" + lines.replace(b"\n", b",\n"), "malformed JSON"
    yield "truncated.parquet", b"PAR1" + lines, "not a readable parquet file|not images"
    yield "unheard_of.csv", lines, "unknown kind of file|not images"


def make(root: Path) -> dict[str, str]:
    """Write everything under root/<kind>/; {file: what must be said}."""
    expected = {}
    for kind, good in GOOD.items():
        (root / kind).mkdir(parents=True)
        other = {**good, "label": "bad"} if kind == "labelled" else good  # two labels are needed
        for name, bad, said in defects(kind):
            lines = [line(good)] * (AT - 1) + [bad] + [line(other)] * (9 - AT)
            (root / kind / f"{name}.jsonl").write_bytes(b"\n".join(lines))
            expected[f"{kind}/{name}.jsonl"] = said
        for name, content, said in whole_files(kind):
            (root / kind / name).write_bytes(content)
            expected[f"{kind}/{name}"] = said
    text = root / "text"
    (text / "directory.jsonl").mkdir()
    os.mkfifo(text / "pipe.jsonl")
    (text / "loop.jsonl").symlink_to("loop.jsonl")
    (text / "nowhere.jsonl").symlink_to("gone.jsonl")
    (text / "zero.jsonl").symlink_to("/dev/zero")
    (text / "bomb.txt.gz").write_bytes(gzip.compress(b" " * 2**27, 1))
    (root / "cyclic").mkdir()
    (root / "cyclic" / "again").symlink_to(".")
    (root / "cyclic" / "rows.jsonl").write_bytes(line(GOOD["text"]))
    locked = root / "locked"
    locked.mkdir()
    (locked / "rows.jsonl").write_bytes(line(GOOD["text"]))
    (locked / "rows.jsonl").chmod(0)
    return expected | {
        "text/directory.jsonl": "a directory without any", "text/pipe.jsonl": "not a file that can be read",
        "text/loop.jsonl": "no such file", "text/nowhere.jsonl": "no such file", "text/zero.jsonl": "not a file that can be read",
        "text/bomb.txt.gz": "over 64 MiB in one piece", "cyclic": "",
        "locked/rows.jsonl": "" if os.geteuid() == 0 else "cannot be read",
    }  # fmt: skip


# ---- the reader, under limits


def readers() -> dict[str, Callable]:
    from jaxllm.data import chat, images, labelled, pairs, problems, ranked, text, unpaired

    rows = lambda check: lambda path: text.checked_rows(path, check)[0]  # noqa: E731
    return {
        "text": lambda path: text.checked_text(path)[0], "cyclic": lambda path: text.checked_text(path)[0],
        "locked": lambda path: text.checked_text(path)[0], "messages": rows(chat.normalise), "completion": rows(chat.normalise),
        "pairs": rows(pairs.normalise_pair), "unpaired": rows(unpaired.normalise_rows), "ranked": rows(ranked.normalise_ranked),
        "problems": rows(problems.problem), "labelled": rows(labelled.check_row),
        "pictures": lambda path: images.read(path).pixels,
    }  # fmt: skip


def main(root: Path, names: list[str]) -> None:
    import pyarrow.parquet  # noqa: F401  it reserves memory that it does not use

    from jaxllm.core.types import UserError
    from jaxllm.data import text

    text.MAX_WHOLE = 2**26
    known = readers()
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**29, resource.RLIM_INFINITY))
    for name in names:
        began, said = time.monotonic(), {"file": name}
        signal.alarm(30)
        try:
            said["rows"] = len(known[name.split("/")[0]](root / name))
        except UserError as error:
            said["error"] = str(error)
        except BaseException:
            said["traceback"] = traceback.format_exc()[-800:]
        finally:
            signal.alarm(0)
        print(json.dumps(said | {"seconds": round(time.monotonic() - began, 2)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.load(sys.stdin))
