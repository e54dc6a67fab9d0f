"""Exported tokenizers give the same ids in transformers, and the exported chat template the tokens of data.chat."""

import json

import pytest

from jaxllm.convert import hf
from jaxllm.data import chat, tokenizer
from jaxllm.models import decoder
from tests.convert.shapes import LLAMA
from tests.models.tiny import weights

pytestmark = pytest.mark.oracle
transformers = pytest.importorskip("transformers")

WORDS = ["some text to train on, again and again. What is 2 plus 3? ünï — ok, a new line " * 9] * 20
TEXTS = ["hello world", "two  spaces", "line\nbreak\n\n x ", "ünï 日本 🎉", "12345", "", "a\tb", "end. ", "\n"]
TALK = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "\nünï?"}, {"role": "assistant", "content": ""},
    {"role": "user", "content": " 2 plus 3 "},
]  # fmt: skip


def gpt2_files(path):
    from tokenizers import ByteLevelBPETokenizer

    made = ByteLevelBPETokenizer()
    made.train_from_iterator(WORDS, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    made.save_model(str(path))
    return tokenizer.load(path)


KINDS = {
    "byte": lambda path: tokenizer.byte_tokenizer(),
    "bpe": lambda path: tokenizer.train_sentencepiece(WORDS, 295),
    "unigram": lambda path: tokenizer.train_sentencepiece(WORDS, 294, kind="unigram"),
    "gpt2": gpt2_files,
}


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    ours = KINDS[request.param](path)
    config = decoder.DecoderConfig(**{**LLAMA.__dict__, "vocab_size": ours.vocab_size})
    model = decoder.make(config)
    hf.save(path / "export", model, weights(model.specs), ours)
    assert tokenizer.fingerprint(tokenizer.load(path / "export")) == tokenizer.fingerprint(ours)
    return ours, transformers.AutoTokenizer.from_pretrained(path / "export"), path / "export"


def test_ids_and_text(both):
    ours, theirs, directory = both
    for text in TEXTS:
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids, text
        assert theirs.decode(ids) == ours.decode(ids) == text
    assert len(theirs) == ours.vocab_size
    assert theirs.eos_token_id == ours.specials["eos"] and theirs.pad_token_id == ours.specials["pad"]
    written = json.loads((directory / "config.json").read_text())
    assert written["eos_token_id"] == ours.specials["eos"]


def test_chats(both):
    ours, theirs, directory = both
    if "end" not in ours.specials:
        assert not (directory / "chat_template.jinja").exists()
        return
    for prompt in (False, True):
        got = theirs.apply_chat_template(TALK, add_generation_prompt=prompt, tokenize=True, return_dict=False)
        assert got == chat.encode_chat(ours, TALK, generation_prompt=prompt).tokens.tolist()


def test_generation_config(both):
    ours, _, directory = both
    ends = transformers.GenerationConfig.from_pretrained(directory).eos_token_id
    assert ends == list(chat.stop_ids(ours))
