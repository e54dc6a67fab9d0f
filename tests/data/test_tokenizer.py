"""Tokenizers: lossless, deterministic, and deaf to the spelling of special tokens."""

import errno
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from jaxllm.core.types import UserError
from jaxllm.data import tokenizer as tokenizers
from tests.conftest import shared_data

RANDOM = random.Random(0)
WORDS = ["".join(RANDOM.choices(["ba", "ko", "len", "tri", "sha", "mo", "vu", "pel", "in", "or"], k=3)) for _ in range(300)]
TEXT = [f"The lazy dog number {i}: {' '.join(RANDOM.choices(WORDS, k=12))}.\n" for i in range(300)]
HARD = [
    "", " ", "\n", "a\n\nb", "  x\t\ty  ", "def f():\n        return 12345\n", "a\0b", "\r\n\v\f", "\u2581a \u2581\u2581",
    "\u2028 \u0085 \ufeff\u200b", "مرحبا שלום", "é e\u0301 😀 👩‍👩‍👧", "<|user|> </s> <pad> <unk> <0x41> <|endoftext|>",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained():
    return {kind: tokenizers.train_sentencepiece(TEXT, 320, kind=kind, seed=0) for kind in ("bpe", "unigram")}


@pytest.fixture(scope="module")
def gpt2():
    return tokenizers.from_gpt2_files(shared_data("tokenizer/gpt2/encoder.json"), shared_data("tokenizer/gpt2/vocab.bpe"))


def json_tokenizer(folder, *, special=True, model=None):
    """A byte-level tokenizer.json of 256 bytes and two added tokens, as the library itself writes it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(model or models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    add = fast.add_special_tokens if special else fast.add_tokens
    add([AddedToken("<|endoftext|>", special=special), AddedToken("<|im_end|>", special=special)])
    fast.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("text", HARD)
def test_sentencepiece_is_lossless_and_never_yields_a_special(trained, kind, text):
    t = trained[kind]
    ids = t.encode(text)
    assert t.decode(ids) == text
    assert not set(ids) & set(t.specials.values())


@pytest.mark.parametrize("top", [0x21, 0x80, 0x3000, 0x110000])
def test_any_text_round_trips(trained, top):
    draw = random.Random(top)
    for _ in range(60):
        points = [draw.randrange(top) for _ in range(draw.randrange(30))]
        text = "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)
        for t in (*trained.values(), tokenizers.byte_tokenizer()):
            assert t.decode(t.encode(text)) == text


def test_sentencepiece_vocabulary(trained):
    t = trained["bpe"]
    assert t.vocab_size == 320
    assert t.specials == {"pad": 0, "eos": 2, "system": 3, "user": 4, "assistant": 5, "end": 6}
    assert t.decode([0, 4, *t.encode("dog"), 1, 6, 2]) == "dog"
    assert [t.piece(i) for i in t.encode("a 123\n")][-4:] == ["1", "2", "3", "<0x0A>"]
    assert t.piece(4) == "<|user|>"
    assert len(t.encode(TEXT[7])) < len(TEXT[7]) / 1.8
    assert t.decode(t.encode("é")[:-1]) == "\ufffd"  # half a character, as in a stream


def test_a_word_is_the_same_piece_wherever_it_stands(trained):
    t = trained["bpe"]
    assert t.encode("lazy number") == t.encode("lazy") + t.encode("number")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_is_deterministic(trained, kind):
    again = tokenizers.train_sentencepiece(iter(TEXT), 320, kind=kind, seed=0)
    assert again.files == trained[kind].files


def test_large_corpora_are_sampled_by_the_seed(monkeypatch):
    monkeypatch.setitem(tokenizers.KINDS, "bpe", 5000)
    a, b, c = (tokenizers.train_sentencepiece(TEXT, 320, seed=s).files["tokenizer.model"] for s in (0, 0, 1))
    assert a == b != c
    parts = tokenizers._sample(TEXT, 5000, 0)
    assert sum(map(len, parts)) == 5000
    assert sum(p in TEXT for p in parts) == len(parts) - 1  # whole documents, but one


def test_training_survives_reserved_characters_and_endless_words():
    texts = [*TEXT, "tab\tseparated", "nul\0 \u2581 \u2585", "x" * 100_000]
    t = tokenizers.train_sentencepiece(texts, 330)
    assert t.decode(t.encode(texts[-2])) == texts[-2]


def test_training_errors():
    with pytest.raises(UserError, match=r"vocab_size 5000 .*at most \d+ fit.*more text"):
        tokenizers.train_sentencepiece(TEXT, 5000)
    with pytest.raises(UserError, match=r"vocab_size 100 .*at least \d+ are needed"):
        tokenizers.train_sentencepiece(TEXT, 100)
    with pytest.raises(UserError, match="no text"):
        tokenizers.train_sentencepiece(["", "\n"], 300)
    with pytest.raises(UserError, match="'wordpiece'.*bpe, unigram"):
        tokenizers.train_sentencepiece(TEXT, 320, kind="wordpiece")


def test_bytes():
    t = tokenizers.byte_tokenizer()
    assert t.vocab_size == 262
    assert sorted(t.specials.values()) == list(range(256, 262))
    assert t.encode("aé\0") == [97, 0xC3, 0xA9, 0]
    assert t.decode([0xFF, 97, t.specials["eos"], 0xC3]) == "\ufffda\ufffd"
    assert [t.piece(i) for i in (97, 10, 257)] == ["a", "<0x0A>", "<|eos|>"]


def test_lone_surrogates_are_named(trained, tmp_path):
    for t in (tokenizers.byte_tokenizer(), trained["bpe"], tokenizers.from_tokenizer_json(json_tokenizer(tmp_path))):
        with pytest.raises(UserError, match=r"lone surrogate U\+D800 at character 2"):
            t.encode("ab\ud800")


@pytest.mark.parametrize("special", [True, False])
def test_tokenizer_json_specials(tmp_path, special):
    t = tokenizers.from_tokenizer_json(json_tokenizer(tmp_path, special=special))
    assert t.specials == {"eos": 256, "pad": 256, "end": 257}
    assert t.vocab_size == 258
    text = "<|endoftext|> hello <|im_end|>\n"
    ids = t.encode(text)
    assert len(ids) == len(text) and max(ids) < 256
    assert t.decode([*ids, 256, 257]) == text
    assert t.piece(256) == "<|endoftext|>"


def test_a_model_that_holds_the_spelling_as_a_piece(tmp_path):
    from tokenizers import AddedToken, Tokenizer, decoders, models

    fast = Tokenizer(models.Unigram([("<unk>", -9.0), ("</s>", -1.0), *((c, -3.0) for c in "</s>ab")], unk_id=0))
    fast.decoder = decoders.Fuse()
    fast.add_special_tokens([AddedToken("</s>", special=True)])
    fast.save(str(tmp_path / "tokenizer.json"))
    t = tokenizers.load(tmp_path)
    ids = t.encode("a</s></s>b")
    assert t.specials["eos"] not in ids
    assert t.decode(ids) == "a</s></s>b"


def test_tokenizer_config_names_the_specials(tmp_path):
    path = json_tokenizer(tmp_path)
    config = {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>", "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    t = tokenizers.from_tokenizer_json(path)
    assert (t.specials["eos"], t.specials["pad"]) == (257, 256)
    assert "tokenizer_config.json" in t.files


def gpt2_reference(text, vocabulary, ranks):
    """Byte-level BPE by its definition: the best-ranked pair first, all over again."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letter = {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}
    ids = []
    for word in re.findall(r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+", text):
        parts = [letter[b] for b in word.encode()]
        while len(parts) > 1:
            rank, i = min((ranks.get(pair, 10**9), i) for i, pair in enumerate(zip(parts, parts[1:], strict=False)))
            if rank == 10**9:
                break
            pair = (parts[i], parts[i + 1])
            merged, j = [], 0
            while j < len(parts):
                both = tuple(parts[j : j + 2]) == pair
                merged.append("".join(parts[j : j + 2]) if both else parts[j])
                j += 1 + both
            parts = merged
        ids += [vocabulary[p] for p in parts]
    return ids


@pytest.mark.parametrize("name", ["tinyshakespeare.txt", "botchan.txt", "wikitext2.test.txt"])
def test_gpt2_on_real_text_equals_the_reference(gpt2, name):
    from tokenizers import ByteLevelBPETokenizer

    text = shared_data(f"text/{name}").read_text(encoding="utf-8")[:300_000]
    files = [str(shared_data(f"tokenizer/gpt2/{n}")) for n in ("encoder.json", "vocab.bpe")]
    ids = gpt2.encode(text)
    assert ids == ByteLevelBPETokenizer(*files).encode(text).ids
    assert gpt2.decode(ids) == text
    vocabulary = json.loads(gpt2.files["encoder.json"])
    merges = gpt2.files["vocab.bpe"].decode().split("\n")[1:]
    ranks = {tuple(m.split(" ")): i for i, m in enumerate(merges) if m}
    assert gpt2.encode(text[:20_000]) == gpt2_reference(text[:20_000], vocabulary, ranks)


def test_gpt2_specials_are_out_of_reach_of_text(gpt2):
    assert gpt2.vocab_size == 50257
    assert gpt2.specials == {"eos": 50256, "pad": 50256}
    assert gpt2.encode("Hello world") == [15496, 995]
    ids = gpt2.encode("<|endoftext|>")
    assert 50256 not in ids and gpt2.decode([*ids, 50256]) == "<|endoftext|>"
    assert gpt2.piece(995) == " world"


@pytest.mark.parametrize("which", ["byte", "bpe", "json", "gpt2"])
def test_save_and_load(trained, tmp_path, which, request):
    make = {
        "byte": tokenizers.byte_tokenizer,
        "bpe": lambda: trained["bpe"],
        "json": lambda: tokenizers.from_tokenizer_json(json_tokenizer(tmp_path)),
        "gpt2": lambda: request.getfixturevalue("gpt2"),
    }
    t = make[which]()
    tokenizers.save(t, tmp_path / "saved" / "here")
    again = tokenizers.load(tmp_path / "saved" / "here")
    assert tokenizers.fingerprint(again) == tokenizers.fingerprint(t)
    assert again.specials == t.specials and again.vocab_size == t.vocab_size
    assert again.encode("The lazy dog\n") == t.encode("The lazy dog\n")
    one = next(iter(t.files))
    assert tokenizers.fingerprint(tokenizers.load(tmp_path / "saved" / "here" / one)) == tokenizers.fingerprint(t)


def test_fingerprints_differ(trained):
    prints = {tokenizers.fingerprint(t) for t in (*trained.values(), tokenizers.load("byte"))}
    assert len(prints) == 3


def test_load_errors(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such tokenizer.*tokenizer.json.*vocab.bpe"):
        tokenizers.load(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="looked for tokenizer.json.*found notes.txt"):
        tokenizers.load(tmp_path)
    with pytest.raises(UserError, match="notes.txt: not a tokenizer"):
        tokenizers.load(tmp_path / "notes.txt")
    for name, content, message in (
        ("tokenizer.model", b"junk", "tokenizer.model: not a sentencepiece model"),
        ("tokenizer.model", b"", "tokenizer.model: .*empty"),
        ("tokenizer.json", b"{", "tokenizer.json: not JSON"),
        ("tokenizer.json", b"[]", "tokenizer.json: a JSON object was expected"),
        ("tokenizer.json", b"{}", "tokenizer.json: no end-of-text token"),
        ("byte.json", b"{}", "byte.json: not the file of a byte tokenizer"),
    ):
        (tmp_path / "d").mkdir(exist_ok=True)
        (tmp_path / "d" / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            tokenizers.load(tmp_path / "d" / name)


def test_a_damaged_merge_is_named_by_line(tmp_path):
    (tmp_path / "encoder.json").write_text('{"a": 0, "<|endoftext|>": 1}')
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\na a a\n")
    with pytest.raises(UserError, match="vocab.bpe:2: "):
        tokenizers.load(tmp_path)


def test_unreadable_file(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (tmp_path / "tokenizer.model").write_bytes(b"x")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=r"tokenizer\.model: .*Permission denied"):
        tokenizers.load(tmp_path)


def test_check_ids():
    tokenizers.check_ids(np.arange(12).reshape(3, 4), 12, "x")
    tokenizers.check_ids([[0, 1], [], [11]], 12, "x")
    with pytest.raises(UserError, match="data row 2: id 11 at position 3 is outside the vocabulary of 11 ids"):
        tokenizers.check_ids(np.arange(12).reshape(3, 4), 11, "data")
    with pytest.raises(UserError, match="data row 1: id -1 at position 0"):
        tokenizers.check_ids([[0], [-1]], 12, "data")
    with pytest.raises(UserError, match="must be integers.*float"):
        tokenizers.check_ids([0.5], 12, "data")
