"""Tokenizers: nothing is lost, text never becomes a special token, GPT-2's ids are the reference's."""

import json

import numpy as np
import pytest

from jaxllm.core.types import UserError
from jaxllm.data import tokenizer as tokenizers
from tests.conftest import shared_data

WORDS = "the quick brown fox jumps over a lazy dog while 42 birds sing (softly), don't they?\n"
CORPUS = [" ".join(np.random.default_rng(i).permutation(WORDS.split(" "))) for i in range(200)]
NASTY = [
    "", " ", "  two  spaces ", "a\nb\n\n", "\r\n\t", "\0nul", "\ufeffbom", "e\u2028\u0085f",
    "\u2581x\u2581 \u2581", "\u65e5\u672c \U0001f389 e\u0301",
    " \u2047 ", "<0x41>", "<|user|>hi<|end|></s><s><unk><pad>",
    "<|endoftext|>" * 3,
]  # fmt: skip


def make(kind):
    if kind == "byte":
        return tokenizers.byte_tokenizer()
    return tokenizers.train_sentencepiece(CORPUS, 320, kind=kind, seed=0)


def gpt2():
    return tokenizers.load(shared_data("tokenizer/gpt2/encoder.json").parent)


@pytest.fixture(scope="module", params=["byte", "bpe", "unigram", "gpt2"])
def tokenizer(request):
    return gpt2() if request.param == "gpt2" else make(request.param)


@pytest.mark.parametrize("text", NASTY)
def test_text_comes_back_and_is_never_special(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.specials.values())
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_any_text_comes_back(tokenizer):
    rng = np.random.default_rng(0)
    for top in (0x80, 0x3000, 0xD800, 0x110000):
        for _ in range(50):
            points = rng.integers(0, top, 40)
            text = "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_half_a_character_is_refused(tokenizer):
    with pytest.raises(UserError, match="surrogate.*character 2"):
        tokenizer.encode("ab\ud800")


def test_specials_are_dropped_and_readable(tokenizer):
    ids = tokenizer.encode("one two")
    mixed = [i for pair in zip(ids, [tokenizer.specials["eos"]] * len(ids), strict=True) for i in pair]
    assert tokenizer.decode(mixed) == "one two"
    assert "".join(tokenizer.piece(i) for i in ids) == "one two"


def test_what_is_saved_is_loaded(tokenizer, tmp_path):
    tokenizers.save(tokenizer, tmp_path)
    again = tokenizers.load(tmp_path)
    assert tokenizers.fingerprint(again) == tokenizers.fingerprint(tokenizer)
    assert again.specials == tokenizer.specials and again.vocab_size == tokenizer.vocab_size
    assert again.encode(WORDS) == tokenizer.encode(WORDS)


def test_fingerprints_tell_tokenizers_apart():
    other = tokenizers.train_sentencepiece(CORPUS, 330, seed=0)
    assert len({tokenizers.fingerprint(t) for t in (make("byte"), make("bpe"), make("unigram"), other)}) == 4


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_twice_gives_the_same_bytes(kind):
    assert make(kind).files == make(kind).files


def test_a_trained_vocabulary_has_the_size_asked_for_and_role_tokens():
    trained = make("bpe")
    assert trained.vocab_size == 320
    assert {"pad", "eos", "system", "user", "assistant", "end"} <= set(trained.specials)
    text = "the quick brown fox"
    assert len(trained.encode(text)) < 0.7 * len(text)  # it did learn parts of the words
    assert len(trained.encode("4242")) == 4  # digits stand alone


@pytest.mark.parametrize(("texts", "size"), [([], 300), (["  \n"], 100_000), (CORPUS, 20), (CORPUS, 100_000)])
def test_a_vocabulary_that_does_not_fit_is_refused(texts, size):
    with pytest.raises(UserError) as error:
        tokenizers.train_sentencepiece(texts, size, seed=0)
    assert "\n" not in str(error.value) and (not texts or str(size) in str(error.value))


@pytest.mark.parametrize("name", ["tinyshakespeare.txt", "botchan.txt", "wikitext2.test.txt"])
def test_gpt2_tokenisation_equals_the_reference(name):
    from tokenizers import ByteLevelBPETokenizer

    folder = shared_data("tokenizer/gpt2/encoder.json").parent
    text = shared_data(f"text/{name}").read_bytes().decode()
    reference = ByteLevelBPETokenizer.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    mine = gpt2()
    ids = mine.encode(text)
    assert ids == reference.encode(text).ids
    assert mine.decode(ids) == text


def test_gpt2_gives_the_ids_that_are_published():
    mine = gpt2()
    assert mine.encode("Hello world") == [15496, 995]
    assert mine.vocab_size == 50257 and mine.specials["eos"] == 50256
    assert 50256 not in mine.encode("<|endoftext|>")


def test_a_tokenizer_json_reads_like_the_library_but_keeps_specials_out(tmp_path):
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=specials, initial_alphabet=alphabet)
    library.train_from_iterator(CORPUS, trainer)
    library.save(str(tmp_path / "tokenizer.json"))
    mine = tokenizers.load(tmp_path)
    assert mine.encode(WORDS) == library.encode(WORDS).ids
    assert mine.specials["user"] == library.token_to_id("<|user|>") and mine.vocab_size == 320
    text = "say <|user|> and <|endoftext|>"
    assert library.token_to_id("<|user|>") in library.encode(text).ids  # what the library alone would do
    assert not set(mine.encode(text)) & set(mine.specials.values()) and mine.decode(mine.encode(text)) == text


def test_a_tokenizer_that_is_not_there_or_damaged_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        tokenizers.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="tokenizer.json"):
        tokenizers.load(tmp_path)
    for name, content in (("tokenizer.json", "{"), ("tokenizer.model", "no model"), ("byte.json", "{}")):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text(content)
        with pytest.raises(UserError, match=name):
            tokenizers.load(folder)


def test_a_tokenizer_json_without_an_end_of_text_is_refused(tmp_path):
    model = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    with pytest.raises(UserError, match="end-of-text"):
        tokenizers.load(path)


def test_ids_outside_the_vocabulary_are_named_with_their_row():
    tokenizers.check_ids(np.array([[0, 1], [48, 49]]), 50, "f.bin")
    for ids in (np.array([[1, 2], [3, 99]]), [[1], [2, 99]]):
        with pytest.raises(UserError, match="f.bin row .*99.*50"):
            tokenizers.check_ids(ids, 50, "f.bin")
    with pytest.raises(UserError, match="-1"):
        tokenizers.check_ids([[0, -1]], 50, "f.bin")
