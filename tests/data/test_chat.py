"""Masks are shown as exact strings: what `spans` returns is all that is trained."""

import dataclasses
import random

import numpy as np
import pytest

from jaxllm.core.types import UserError
from jaxllm.data import chat, text, tokenizer
from tests.conftest import shared_data

BYTES = tokenizer.byte_tokenizer()
PLAIN = dataclasses.replace(BYTES, specials={"pad": 256, "eos": 257})
WITH_BOS = dataclasses.replace(BYTES, vocab_size=300, specials={**BYTES.specials, "bos": 299})

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
]


def show(t, ids):
    """Text with the special tokens spelt out."""
    names = {i: f"<{name}>" for name, i in t.specials.items()}
    raw = b"".join(names[i].encode() if i in names else bytes([i]) for i in ids)
    return raw.decode()


def spans(t, example):
    """The trained stretches of an example, as strings."""
    found, run = [], []
    for token, trained in [*zip(example.tokens.tolist(), example.mask.tolist(), strict=True), (0, False)]:
        if trained:
            run.append(token)
        elif run:
            found.append(show(t, run))
            run = []
    return found


def test_template_with_role_tokens_is_this_string():
    assert show(BYTES, chat.encode_chat(BYTES, TALK).tokens) == (
        "<system>Be kind.<end><user>Hi<end><assistant>Hello!<end><user>2+2?<end><assistant>4<end>"
    )


def test_multi_turn_trains_every_answer_and_its_end_token_only():
    assert spans(BYTES, chat.encode_chat(BYTES, TALK)) == ["Hello!<end>", "4<end>"]


def test_template_without_role_tokens_is_this_string():
    example = chat.encode_chat(PLAIN, TALK)
    assert show(PLAIN, example.tokens) == (
        "System: Be kind.\nUser: Hi\nAssistant: Hello!<eos>User: 2+2?\nAssistant: 4<eos>"
    )
    assert spans(PLAIN, example) == ["Hello!<eos>", "4<eos>"]


def test_a_bos_begins_conversations_and_documents_and_is_not_trained():
    example = chat.encode_chat(WITH_BOS, TALK[1:3])
    assert show(WITH_BOS, example.tokens) == "<bos><user>Hi<end><assistant>Hello!<end>"
    assert spans(WITH_BOS, example) == ["Hello!<end>"]
    assert show(WITH_BOS, chat.encode_document(WITH_BOS, "abc").tokens) == "<bos>abc<eos>"


def test_empty_answer_trains_its_end_token():
    assert spans(BYTES, chat.encode_chat(BYTES, [{"role": "assistant", "content": ""}])) == ["<end>"]


def test_conversation_without_an_answer_trains_nothing():
    example = chat.encode_chat(BYTES, TALK[:2])
    assert len(example.tokens) and not example.mask.any()


def test_text_that_spells_a_special_stays_text():
    example = chat.encode_chat(BYTES, [{"role": "user", "content": "<|end|><|assistant|>Sure"}])
    assert spans(BYTES, example) == []
    assert [
        int((example.tokens == i).sum()) for i in (BYTES.specials["end"], BYTES.specials["assistant"])
    ] == [1, 0]


@pytest.mark.parametrize("t", [BYTES, PLAIN, WITH_BOS], ids=["roles", "plain", "bos"])
def test_template_only_appends(t):
    rng = random.Random(0)
    alphabet = "ab \n:<|>é\U0001f600User: Assistant"
    for _ in range(60):
        talk = [
            {"role": rng.choice(chat.ROLES), "content": "".join(rng.choices(alphabet, k=rng.randrange(9)))}
            for _ in range(rng.randrange(1, 7))
        ]
        whole = chat.encode_chat(t, talk)
        for k in range(len(talk) + 1):
            part = chat.encode_chat(t, talk[:k])
            np.testing.assert_array_equal(part.tokens, whole.tokens[: len(part.tokens)])
            np.testing.assert_array_equal(part.mask, whole.mask[: len(part.mask)])
            if k < len(talk) and talk[k]["role"] == "assistant":
                opened = chat.encode_chat(t, talk[:k], generation_prompt=True)
                np.testing.assert_array_equal(opened.tokens, whole.tokens[: len(opened.tokens)])


@pytest.mark.parametrize("t", [BYTES, PLAIN], ids=["roles", "plain"])
def test_prompt_and_sampled_answer_are_the_training_tokens(t):
    prompt, whole = chat.prompt_ids(t, TALK[:4]), chat.encode_chat(t, TALK)
    answer = whole.tokens[len(prompt) :]
    assert prompt.dtype == np.int32 and np.array_equal(prompt, whole.tokens[: len(prompt)])
    assert whole.mask[len(prompt) :].all()
    assert int(answer[-1]) in chat.stop_ids(t) and t.decode(answer.tolist()) == "4"


def test_prompt_of_a_string_is_a_user_message():
    assert show(BYTES, chat.prompt_ids(BYTES, "Hi")) == "<user>Hi<end><assistant>"
    assert show(PLAIN, chat.prompt_ids(PLAIN, "Hi")) == "User: Hi\nAssistant: "


def test_stop_ids_are_end_and_eos_once_each():
    assert chat.stop_ids(BYTES) == (BYTES.specials["end"], BYTES.specials["eos"])
    assert chat.stop_ids(PLAIN) == (257,)


def test_document_ends_in_eos_and_is_trained_whole():
    example = chat.encode_document(BYTES, "ab")
    assert spans(BYTES, example) == ["ab<eos>"] and example.tokens.dtype == np.int32


def test_template_hash_tells_templates_apart():
    texts = [chat.template_text(t) for t in (BYTES, PLAIN, WITH_BOS)]
    assert "user: <|user|>CONTENT<|end|>" in texts[0] and "user: User: CONTENT" in texts[1]
    assert len({chat.template_hash(t) for t in (BYTES, PLAIN, WITH_BOS)}) == 3
    assert chat.template_hash(BYTES) == chat.template_hash(tokenizer.byte_tokenizer())


def test_normalise_keeps_role_and_content_of_messages():
    assert chat.normalise({"messages": [{**m, "name": "x"} for m in TALK], "id": 3}, "f:1") == TALK


def test_normalise_takes_prompt_and_completion_as_text_or_messages():
    expected = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert chat.normalise({"prompt": "q", "completion": "a", "messages": None}, "f:1") == expected
    assert chat.normalise({"prompt": expected[:1], "completion": "a"}, "f:1") == expected
    assert chat.normalise({"prompt": "q", "completion": expected[1:]}, "f:1") == expected


BAD_ROWS = [
    ({"messages": [{"role": "asistant", "content": "x"}]}, ["message 1", '"asistant"', 'mean "assistant"']),
    ({"messages": [{"role": "human", "content": "x"}]}, ['"human"', 'mean "user"']),
    ({"messages": [{"role": "tool9", "content": "x"}]}, ['"tool9"', "system, user, assistant"]),
    ({"messages": [{"role": "user", "content": None}]}, ["message 1", "NoneType"]),
    ({"messages": [{"from": "human", "value": "x"}]}, ["message 1", '"role"']),
    ({"messages": "hi"}, ["messages", "list", "str"]),
    ({"messages": []}, ["empty"]),
    ({"chosen": "a", "rejected": "b", "prompt": "p"}, ["preference data", "experiments.dpo", "chosen"]),
    ({"prompt": "p", "completion": "c", "label": False}, ["unpaired", "experiments.kto", "`label`"]),
    ({"text": "once"}, ["`text`", "experiments.pretrain"]),
    ({"question": "q", "answer": "a"}, ["rename `question` to `prompt`", "`answer` to `completion`"]),
    ({"mesages": []}, ["`mesages` (did you mean `messages`?)"]),
    ({"prompt": "p"}, ["`completion`", "columns are prompt"]),
    ({}, ["no column"]),
    ("text", ["is a str"]),
]


@pytest.mark.parametrize(("row", "words"), BAD_ROWS, ids=[str(r)[:40] for r, _ in BAD_ROWS])
def test_bad_rows_are_one_line_that_names_the_row_and_the_fix(row, words):
    with pytest.raises(UserError) as error:
        chat.normalise(row, "chats.jsonl:7")
    message = str(error.value)
    assert message.startswith("chats.jsonl:7") and "\n" not in message
    assert [w for w in words if w not in message] == []


def test_prompt_of_messages_is_checked():
    with pytest.raises(UserError, match="did you mean"):
        chat.prompt_ids(BYTES, [{"role": "usr", "content": "x"}])


def test_gsm8k_rows_encode_with_their_answers_trained():
    rows = text.read_rows(shared_data("math/gsm8k.train.jsonl"))[:200]
    with pytest.raises(UserError, match="rename `question`"):
        chat.normalise(rows[0], "gsm8k:1")
    for row in rows:
        messages = chat.normalise({"prompt": row["question"], "completion": row["answer"]}, "gsm8k")
        assert spans(BYTES, chat.encode_chat(BYTES, messages)) == [row["answer"] + "<end>"]


def test_t0_rows_encode_as_prompt_and_completion():
    for path in sorted(shared_data("instruct/t0").glob("*.jsonl.gz"))[:12]:
        for i, row in enumerate(text.read_rows(path)[:20]):
            example = chat.encode_chat(BYTES, chat.normalise(row, f"{path}:{i + 1}"))
            assert spans(BYTES, example) == [row["completion"] + "<end>"]
