"""Rows, settings, checkpoints and weights, mutated: what comes out is a result or one clear error, never another exception.

The same examples every time; JAXLLM_FUZZ=10000 tries others, and more of them.
"""

import json
import os
import shutil

import pytest

from jaxllm import launch, settings
from jaxllm.convert import safetensors
from jaxllm.core.types import UserError
from jaxllm.data import chat, denoise, images, labelled, pack, pairs, problems, ranked, text, tokenizer, unpaired
from jaxllm.data.tokenizer import byte_tokenizer
from jaxllm.models import families
from tests.convert.test_safetensors import A, craft
from tests.data.corpora import GOOD, line

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
BYTES = byte_tokenizer()
MORE = int(os.environ.get("JAXLLM_FUZZ") or 0)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["", "user", "assistant"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=3),
    max_leaves=6,
)


def fuzzed(examples, **given):
    """A test over few examples that are always the same, or over JAXLLM_FUZZ new ones."""
    profile = hypothesis.settings(
        max_examples=MORE or examples, derandomize=not MORE, deadline=None, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    return lambda test: profile(hypothesis.given(**given)(test))


@st.composite
def mutated(draw, value):
    """A JSON value with one or two of its parts replaced, or taken out."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 2))):
        spots, todo = [], [value]
        while todo:
            node = todo.pop()
            keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
            spots += [(node, key) for key in keys]
            todo += [node[key] for key in keys]
        if spots:
            node, key = draw(st.sampled_from(range(len(spots))).map(lambda i, spots=spots: spots[i]))
            if isinstance(node, dict) and draw(st.integers(0, 3)) == 0:
                del node[key]
            else:
                node[key] = draw(VALUES)
    return value


PIECES = st.sampled_from([b'"', b"\\ud800", b"{", b"]", b"\n", b"NaN", b",", b"9" * 9])


@st.composite
def scrambled(draw, content):
    """Bytes with a few places overwritten, cut out or doubled."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        width = draw(st.integers(0, 8))
        content[at : at + width] = draw(st.binary(max_size=4) | PIECES)
    return bytes(content)


# ---- rows, from the file to the tokens

ENCODE = {
    "text": lambda path: [chat.encode_document(BYTES, d) for d in text.read_text(path)],
    "messages": lambda path: [chat.encode_chat(BYTES, m) for m in text.checked_rows(path, chat.normalise)[0]],
    "pairs": lambda path: pairs.encode_pairs(BYTES, text.checked_rows(path, pairs.normalise_pair)[0], 32),
    "unpaired": lambda path: unpaired.encode_unpaired(BYTES, sum(text.checked_rows(path, unpaired.normalise_rows)[0], []), 32),
    "ranked": lambda path: ranked.encode_ranked(BYTES, text.checked_rows(path, ranked.normalise_ranked)[0], 32),
    "problems": lambda path: [chat.prompt_ids(BYTES, p.prompt) for p in problems.read_problems(path)],
    "labelled": lambda path: labelled.encode(BYTES, text.checked_rows(path, labelled.check_row)[0], "rows", 16),
    "pictures": lambda path: images.read(path),
    "text2text": lambda path: text.checked_rows(path, denoise.text_pair),
}
ENCODE["completion"] = ENCODE["messages"]
ROWS = {
    **{kind: [row] for kind, row in GOOD.items()}, "text2text": [{"input": "a b", "target": "c", "task": "t"}],
    "labelled": [
        GOOD["labelled"], {"text": "a", "text_b": "b", "label": 1}, {"words": ["a", "b"], "labels": ["N", "O"]},
        {"question": "Who?", "context": "Ann rang.", "answer": "Ann", "start": 0},
        {"text": "up", "choices": ["x", "y"], "label": 0},
    ],
}  # fmt: skip
KINDS = sorted(ENCODE)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def read(place, kind, content):
    path = place / f"{kind}.jsonl"
    path.write_bytes(content)
    try:
        found = ENCODE[kind](path)
    except UserError as error:
        assert str(error) and "\n" not in str(error)
        return
    if kind in ("text", "messages", "completion"):
        pack.pack(found, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_other_values(kind, place):
    @fuzzed(60, row=st.sampled_from(ROWS[kind]).flatmap(mutated), times=st.integers(1, 2))
    def check(row, times):
        read(place, kind, b"\n".join([line(ROWS[kind][0]), *[json.dumps(row).encode()] * times]))

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_other_bytes(kind, place):
    @fuzzed(40, content=scrambled(b"\n".join([line(row) for row in ROWS[kind]] * 2)))
    def check(content):
        read(place, kind, content)

    check()


# ---- settings

NAMES = sorted(settings.settings_of(settings.load_config(settings.config_path("sft"))))
WORDS = st.sampled_from(
    ["", "1", "-1", "1e3", "2k", "1e999", "nan", "inf", "true", "(1,", "[]", "{}", "None", "a=b", "x" * 300, "\0", "é", "(" * 500]
)
FLAGS = st.one_of(
    st.builds("--config.{}={}".format, st.sampled_from(NAMES), WORDS | st.text(max_size=6)),
    st.builds("--config.{}".format, st.sampled_from(NAMES)),
    st.builds("--noconfig.{}".format, st.sampled_from(NAMES)),
    st.builds("--{}={}".format, st.sampled_from(["workdir", "debug", "config", "config.", "processes", "help"]), WORDS),
    st.builds("--config.{}={}".format, st.text(st.sampled_from("abc._-optimlr"), max_size=12), WORDS),
    st.builds("-{}".format, st.text(max_size=6)),
    st.text(max_size=8),
)


@fuzzed(300, argv=st.lists(FLAGS, max_size=4))
def test_command_lines(argv):
    try:
        command = settings.parse(argv, "sft", {"stage": "", "n": 3})
    except ValueError as error:
        assert str(error)
        return
    assert sorted(settings.settings_of(command.config)) == NAMES and command.config.is_locked


@fuzzed(100, values=st.dictionaries(st.sampled_from([*NAMES, "optim", "optim.", "lr", ""]), VALUES, max_size=3))
def test_overrides_inside_a_process(values):
    config = settings.load_config(settings.config_path("sft"))
    checked, errors = settings.check_overrides(config, values)
    if not errors:
        with config.unlocked():
            config.update_from_flattened_dict(checked)


# ---- checkpoints and weights


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A run with one checkpoint, in a place of its own."""
    return shutil.copytree(base / "sft", tmp_path_factory.mktemp("run") / "sft")


def load(run):
    try:
        return launch.load(run).step
    except UserError as error:
        assert str(error) and "\n" not in str(error)


@pytest.mark.parametrize("kept", [True, False], ids=["with its manifest", "without"])
def test_what_a_checkpoint_says_of_itself(kept, run, tmp_path):
    meta = json.loads(next(run.glob("checkpoints/*/meta/metadata")).read_text())
    meta = {name: meta[name] for name in ("model", "roots", "tokenizer", "config", "step", "lora")} | {"config": {}}
    adapted = {**meta, "lora": {"policy": {"rank": 2, "alpha": 4.0, "match": "attention/q/kernel", "scaling": "standard"}}}

    @fuzzed(12 if kept else 40, changed=(mutated(meta) | mutated(adapted)).map(json.dumps) | scrambled(json.dumps(meta).encode()))
    def check(changed):
        copy = shutil.copytree(run, tmp_path / "copy")
        try:
            (step,) = (copy / "checkpoints").iterdir()
            (step / "meta" / "metadata").write_bytes(changed if isinstance(changed, bytes) else changed.encode())
            if not kept:
                (step / "MANIFEST.json").unlink()
            assert load(copy) is None or not kept, "a changed file passed its checksum"
        finally:
            shutil.rmtree(copy)

    check()


def test_what_a_manifest_says(run, tmp_path):
    manifest = json.loads(next(run.glob("checkpoints/*/MANIFEST.json")).read_text())

    @fuzzed(25, changed=mutated(manifest).map(lambda m: json.dumps(m).encode()) | scrambled(json.dumps(manifest).encode()))
    def check(changed):
        copy = shutil.copytree(run, tmp_path / "copy")
        try:
            next(copy.glob("checkpoints/*")).joinpath("MANIFEST.json").write_bytes(changed)
            load(copy)
        finally:
            shutil.rmtree(copy)

    check()


@fuzzed(80, record=mutated({"family": "decoder", "vocab_size": 64, "d_model": 8, "n_layers": 1, "n_heads": 2, "d_ff": 16}))
def test_what_a_models_record_says(record):
    sizes = [v for v in record.values() if isinstance(v, int)] if isinstance(record, dict) else []
    hypothesis.assume(isinstance(record, dict) and all(abs(size) < 10**5 for size in sizes))
    try:
        families.make(families.from_dict(record))
    except UserError as error:
        assert str(error) and "\n" not in str(error)


ADDED = [
    {"id": id, "content": content, **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)}
    for id, content in ((3, "</s>"), (4, "<|user|>"))
]
VOCABULARY = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], "unk_token": None}
TOKENIZERS = {
    "tokenizer.json": {"version": "1.0", "added_tokens": ADDED, "normalizer": None, "model": VOCABULARY},
    "tokenizer_config.json": {"eos_token": {"content": "</s>"}, "bos_token": None, "chat_template": "{{ messages[0].content }}"},
    "byte.json": {"kind": "byte", "specials": {"pad": 256, "eos": 257}},
    "chat_template.jinja": "{{ messages }}",
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_a_tokenizers_files_say(name, tmp_path):
    names = [name] if name == "byte.json" else [file for file in TOKENIZERS if file != "byte.json"]
    whole = {file: json.dumps(TOKENIZERS[file]).encode() for file in names}

    for file, content in whole.items():
        (tmp_path / file).write_bytes(content)
    assert tokenizer.load(tmp_path).specials["eos"] in (3, 257)

    @fuzzed(120, changed=mutated(TOKENIZERS[name]).map(lambda v: json.dumps(v).encode()) | scrambled(whole[name]))
    def check(changed):
        (tmp_path / name).write_bytes(changed)
        try:
            found = tokenizer.load(tmp_path)
        except UserError as error:
            assert str(error) and "\n" not in str(error)
            return
        assert 0 <= found.specials["eos"] < found.vocab_size and set(found.encode("ab </s>")) <= set(range(found.vocab_size))

    check()


HEADER = {"a": A, "b": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [8, 16]}, "__metadata__": {"format": "pt"}}


@fuzzed(150, header=mutated(HEADER).map(lambda h: json.dumps(h).encode()) | scrambled(json.dumps(HEADER).encode()),
        length=st.none() | st.integers(0, 2**64 - 1))  # fmt: skip
def test_headers_of_safetensors(header, length, place):
    file = craft(place / "model.safetensors", header, length=length)
    try:
        found = safetensors.read_header(file)
    except UserError as error:
        assert str(error) and "\n" not in str(error)
        return
    for tensor in found.values():
        assert 8 <= tensor.begin <= file.stat().st_size
