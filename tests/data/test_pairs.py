import numpy as np
import pytest

from jaxllm.core.types import UserError
from jaxllm.data import pack, text, tokenizer
from jaxllm.data.chat import encode_chat, prompt_ids
from jaxllm.data.pairs import encode_pairs, normalise_pair
from tests.conftest import shared_data

BYTES = tokenizer.byte_tokenizer()


def user(content):
    return {"role": "user", "content": content}


def said(content):
    return {"role": "assistant", "content": content}


SKY = {"prompt": [user("Sky?")], "chosen": [said("Blue.")], "rejected": [said("Green.")]}

SHAPES = {
    "explicit text": {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green."},
    "explicit messages": SKY,
    "explicit prompt text, sides messages": {**SKY, "prompt": "Sky?"},
    "explicit prompt messages, sides text": {**SKY, "chosen": "Blue.", "rejected": "Green."},
    "sides repeat the prompt": {
        "prompt": "Sky?",
        "chosen": [user("Sky?"), said("Blue.")],
        "rejected": [user("Sky?"), said("Green.")],
    },
    "implicit messages": {
        "chosen": [user("Sky?"), said("Blue.")],
        "rejected": [user("Sky?"), said("Green.")],
    },
    "implicit dialogue": {
        "chosen": "\n\nHuman: Sky?\n\nAssistant: Blue.",
        "rejected": "\n\nHuman: Sky?\n\nAssistant: Green.",
    },
    "explicit dialogue": {"prompt": "\n\nHuman: Sky?\n\nAssistant:", "chosen": "Blue.", "rejected": "Green."},
    "null prompt": {
        "prompt": None,
        "chosen": [user("Sky?"), said("Blue.")],
        "rejected": [user("Sky?"), said("Green.")],
    },
    "other columns": {**SKY, "task": {"family": "sky"}, "score_chosen": 3.0},
}


@pytest.mark.parametrize("row", SHAPES.values(), ids=SHAPES)
def test_every_shape_becomes_the_same_pair(row):
    assert normalise_pair(row, "f:1") == SKY


def test_a_normalised_pair_passes_unchanged_whatever_its_form():
    rows = [*SHAPES.values(), {"chosen": "same", "rejected": "same"}, {"chosen": "a b", "rejected": "a c"}]
    for row in rows:
        once = normalise_pair(row, "f:1")
        assert normalise_pair(once, "f:1") == once


def test_implicit_prompt_of_plain_strings_ends_at_a_word():
    pair = normalise_pair({"chosen": "The sky is blue.", "rejected": "The sky is black."}, "f:1")
    assert pair == {"prompt": [user("The sky is")], "chosen": [said(" blue.")], "rejected": [said(" black.")]}
    pair = normalise_pair({"chosen": "Go home", "rejected": "Going"}, "f:1")
    assert pair == {"prompt": [], "chosen": [said("Go home")], "rejected": [said("Going")]}
    pair = normalise_pair({"chosen": "Yes", "rejected": "No"}, "f:1")
    assert pair == {"prompt": [], "chosen": [said("Yes")], "rejected": [said("No")]}


def test_shared_turns_go_to_the_prompt_and_completions_may_have_several():
    shared = [user("a"), said("b"), user("c")]
    pair = normalise_pair(
        {"chosen": [*shared, said("d"), user("e"), said("f")], "rejected": [*shared, said("g")]}, "f:1"
    )
    assert pair["prompt"] == shared
    assert pair["chosen"] == [said("d"), user("e"), said("f")] and pair["rejected"] == [said("g")]


def test_dialogues_that_part_at_a_question_part_before_the_answer_that_led_to_it():
    pair = normalise_pair(
        {
            "chosen": [user("a"), said("b"), user("c"), said("d")],
            "rejected": [user("a"), said("b"), user("x"), said("y")],
        },
        "f:1",
    )
    assert pair["prompt"] == [user("a")]
    assert pair["rejected"] == [said("b"), user("x"), said("y")]


def test_one_side_longer_than_the_other():
    pair = normalise_pair(
        {"chosen": [user("a"), said("b"), user("c"), said("d")], "rejected": [user("a"), said("b")]}, "f:1"
    )
    assert pair == {
        "prompt": [user("a")],
        "chosen": [said("b"), user("c"), said("d")],
        "rejected": [said("b")],
    }


def test_identical_dialogues_keep_their_last_answer():
    talk = [user("a"), said("b"), user("c"), said("d")]
    assert normalise_pair({"chosen": talk, "rejected": talk}, "f:1")["prompt"] == talk[:3]


BAD_ROWS = [
    ({"messages": [said("x")]}, ["looks like SFT data (columns: messages)", "experiments.sft"]),
    ({"prompt": "p", "completion": "c"}, ["looks like SFT data (columns: prompt, completion)"]),
    ({"prompt": "p", "completion": "c", "label": True}, ["unpaired", "experiments.kto", "`rejected`"]),
    ({"text": "t"}, ["`text`", "experiments.pretrain"]),
    ({"prompt": "p", "chosen": "c"}, ["has no `rejected`", "columns are prompt, chosen"]),
    ({"prompt": "p", "choosen": "c", "rejected": "r"}, ["`choosen` (did you mean `chosen`?)"]),
    ({"chosen": [said("x")], "rejected": "x"}, ["without `prompt`", "must both be text"]),
    ({"chosen": [user("x"), said("y")], "rejected": [user("z"), said("y")]}, ["no prompt", "'x'", "'z'"]),
    ({**SKY, "chosen": [user("Why?")]}, ["chosen", "role user"]),
    ({**SKY, "rejected": SKY["prompt"]}, ["rejected", "ends with the prompt"]),
    ({**SKY, "rejected": [{"role": "asistant", "content": ""}]}, ["rejected", 'did you mean "assistant"']),
    ({**SKY, "rejected": 3}, ["rejected", "int"]),
]


@pytest.mark.parametrize(("row", "words"), BAD_ROWS, ids=[w[0][:30] for _, w in BAD_ROWS])
def test_bad_rows_are_one_line_that_names_the_row_and_the_fix(row, words):
    with pytest.raises(UserError) as error:
        normalise_pair(row, "pairs.jsonl:4")
    message = str(error.value)
    assert message.startswith("pairs.jsonl:4") and "\n" not in message
    assert [w for w in words if w not in message] == []


def trained(side, row):
    """What is trained in a row, as a string with the end token spelt out."""
    ids = side["targets"][row][side["mask"][row]].tolist()
    return "".join("<end>" if i == BYTES.specials["end"] else chr(i) for i in ids)


def test_only_the_completion_is_trained_not_the_answers_in_the_prompt():
    row = {
        "prompt": [user("a"), said("before"), user("c")],
        "chosen": [said("good"), user("more?"), said("yes")],
        "rejected": "bad",
    }
    columns, report = encode_pairs(BYTES, [row], 64)
    assert (
        trained(columns["chosen"], 0) == "good<end>yes<end>" and trained(columns["rejected"], 0) == "bad<end>"
    )
    assert report["trained_tokens"] == 13


def test_rows_are_the_template_shifted_by_one():
    columns, report = encode_pairs(BYTES, [SHAPES["implicit dialogue"]], 32)
    for side in ("chosen", "rejected"):
        tokens = encode_chat(BYTES, SKY["prompt"] + SKY[side]).tokens
        n = len(tokens) - 1
        np.testing.assert_array_equal(columns[side]["tokens"][0, :n], tokens[:-1])
        np.testing.assert_array_equal(columns[side]["targets"][0, :n], tokens[1:])
        assert columns[side]["segments"][0].tolist() == [1] * n + [0] * (32 - n)
        # the first trained target follows the generation prompt, as it does when sampling
        assert columns[side]["mask"][0].argmax() == len(prompt_ids(BYTES, "Sky?")) - 1
    assert (report["rows"], report["dropped"], report["truncated"], report["identical"]) == (1, 0, 0, 0)


def test_a_pair_that_loses_a_completion_leaves_both_sides():
    long = "x" * 30
    rows = [
        {"prompt": "a", "chosen": "one", "rejected": "uno"},
        {"prompt": long, "chosen": "b", "rejected": "c"},
        {"prompt": [user("a")], "chosen": [said("two")], "rejected": [said(long)]},
        {"prompt": "a", "chosen": "same", "rejected": "same"},
    ]
    columns, report = encode_pairs(BYTES, rows, 16)
    assert [trained(columns["chosen"], i) for i in range(3)] == ["one<end>", "two<end>", "same<end>"]
    assert [trained(columns["rejected"], i) for i in range(3)] == ["uno<end>", "x" * 13, "same<end>"]
    counts = {k: report[k] for k in ("rows", "examples", "dropped", "untrained", "truncated", "identical")}
    assert counts == {"rows": 3, "examples": 4, "dropped": 1, "untrained": 1, "truncated": 1, "identical": 1}
    with pytest.raises(UserError, match=r"1 of 4 examples.*number 2\)"):
        pack.check_report(report, "pairs.jsonl")


def test_no_pair_gives_empty_columns():
    columns, report = encode_pairs(BYTES, [], 8)
    assert columns["rejected"]["tokens"].shape == (0, 8) and report["rows"] == 0
    with pytest.raises(UserError, match="nothing to train on"):
        pack.check_report(report, "pairs.jsonl")


def test_bad_row_of_many_is_named():
    with pytest.raises(UserError, match="^pair 2 "):
        encode_pairs(BYTES, [SKY, {"text": "x"}], 8)


def test_hh_dialogues_split_at_their_last_answers():
    path = shared_data("preference/hh_harmless_base.jsonl.gz")
    rows = text.read_rows(path)
    pairs = [normalise_pair(row, f"{path}:{i + 1}") for i, row in enumerate(rows)]
    for row, pair in zip(rows, pairs, strict=True):
        for side in ("chosen", "rejected"):
            names = {"user": "\n\nHuman:", "assistant": "\n\nAssistant:"}
            again = "".join(f"{names[m['role']]} {m['content']}" for m in pair["prompt"] + pair[side])
            assert again.split() == row[side].split()
    assert sum(len(p["chosen"]) == len(p["rejected"]) == 1 for p in pairs) > 0.99 * len(pairs)
    columns, report = encode_pairs(BYTES, pairs, 1024)
    assert report["rows"] + report["dropped"] == len(rows) and report["rows"] > 1000
    assert columns["chosen"]["mask"].any(axis=1).all() and columns["rejected"]["mask"].any(axis=1).all()
