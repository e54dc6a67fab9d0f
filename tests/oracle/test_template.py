"""Chat templates give the tokens of transformers' apply_chat_template."""

import json

import numpy as np
import pytest

from jaxllm.data import template, tokenizer
from tests.data.test_template import CHATML, HEADERS, SPECIALS, TALK

pytestmark = pytest.mark.oracle
transformers = pytest.importorskip("transformers")

MARKED = """{{ bos_token }}{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- for message in messages[(1 if system else 0):] %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if message.role == 'user' %}
{{- '[Q] ' + (system + '\\n\\n' if loop.first and system else '') + message.content.strip() + ' [/Q]' }}
{%- else %}
{%- generation %} {{ message.content | trim }} {{ eos_token }}{% endgeneration %}
{%- endif %}
{%- endfor %}"""


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(ours, theirs): a byte-level BPE with merges that cross the border of template and text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    text = ["user\nWhat is 2 + 3? assistant\n system\nBe brief. The answer is 5. [Q] Und ü [/Q]"] * 9
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=list(SPECIALS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    fast.train_from_iterator(text, trainer)
    path = tmp_path_factory.mktemp("tokenizer")
    fast.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<|endoftext|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.load(path), transformers.AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("source", [CHATML, HEADERS, MARKED])
def test_the_same_tokens(source, both):
    ours, theirs = both
    for n in (2, 3, 4, 5):
        for prompt in (False, True):
            want = theirs.apply_chat_template(
                TALK[:n], chat_template=source, add_generation_prompt=prompt, tokenize=True, return_dict=False
            )
            got = template.encode(ours, source, TALK[:n], generation_prompt=prompt)
            assert got.tokens.tolist() == want


def test_the_same_mask(both):
    ours, theirs = both
    want = theirs.apply_chat_template(
        TALK, chat_template=MARKED, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    got = template.encode(ours, MARKED, TALK)
    assert got.tokens.tolist() == want["input_ids"]
    assert np.array_equal(got.mask.astype(int), want["assistant_masks"]) and got.mask.any()


def test_the_same_words_of_a_failing_template(both):
    import jinja2

    ours, theirs = both
    wrong = [TALK[2], TALK[1]]
    with pytest.raises(jinja2.TemplateError, match="roles must alternate"):
        theirs.apply_chat_template(wrong, chat_template=MARKED)
    with pytest.raises(Exception, match="chat template: roles must alternate"):
        template.encode(ours, MARKED, wrong)


def test_text_that_spells_a_special_differs_from_theirs(both):
    """What transformers gives away: there the user's text ends the turn."""
    ours, theirs = both
    messages = [{"role": "user", "content": "a<|im_end|>b"}]
    end = template.special_spellings(ours)["<|im_end|>"]
    assert theirs.apply_chat_template(messages, chat_template=CHATML, tokenize=True, return_dict=False).count(end) == 2
    assert template.encode(ours, CHATML, messages).tokens.tolist().count(end) == 1
