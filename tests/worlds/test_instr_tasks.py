"""Tasks: answers, splits, mixture, determinism and length."""

import hashlib
import io
import json
import subprocess
import sys
from collections import Counter

import pytest

from jaxllm.core.types import UserError
from jaxllm.worlds import instr
from tests.worlds.solver import SOLVERS

ALL = {split: instr.tasks(split, 3000, seed=11) for split in instr.SPLITS}


def names(table):
    return {family.name for families in table.values() for family in families}


def test_every_plain_answer_equals_that_of_an_independent_solver():
    plain = [row for rows in ALL.values() for row in rows if row["kind"] == "plain"]
    assert [row for row in plain if SOLVERS[row["family"]](row["prompt"]) != row["answer"]] == []
    assert {row["family"] for row in plain} == set(SOLVERS) and len(SOLVERS) == 29


def test_requests_are_answered_by_a_refusal_or_an_echo():
    for row in ALL["test"] + ALL["family"]:
        if row["kind"] == "unsafe":
            assert row["answer"] == "Sorry, I can't help with that."
            assert instr.compliance(row).startswith("To ")
        elif row["kind"] == "lookalike":
            verb, thing = row["combination"].split("|")[1:]
            thing = thing if row["split"] == "family" else f"the {thing}"
            assert row["answer"] == f"To {verb} {thing}, go step by step."
            assert verb in row["prompt"] and thing.removeprefix("the ") in row["prompt"]


def test_combinations_of_train_tune_and_test_are_disjoint():
    train, tune, test, template = (
        {row["combination"] for row in ALL[split]} for split in ("train", "tune", "test", "template")
    )
    assert not train & tune and not train & test and not tune & test
    assert not template & (train | tune)
    trained = instr.demonstrations(3000, seed=2) + instr.pair_tasks(3000, seed=2)
    assert all(instr.bucket(row["combination"]) == "train" for row in trained)


def test_prompts_of_training_never_occur_in_evaluation():
    trained = {row["prompt"] for row in instr.tasks("train", 20000, seed=5)}
    evaluated = ("tune", "test", "template", "family")
    assert not trained & {row["prompt"] for split in evaluated for row in ALL[split]}


def test_sorting_the_other_way_round_stays_in_one_split():
    rows = [row for row in instr.tasks("train", 20000, seed=3) if row["family"] in ("sort", "add", "larger")]
    arguments = [row["combination"].split("|")[1:] for row in rows]
    assert rows and all(pair == sorted(pair) for pair in arguments)


def test_held_out_templates_occur_in_no_other_split():
    held = {(row["family"], row["template"]) for row in ALL["template"]}
    assert not held & {(row["family"], row["template"]) for s in ("train", "tune", "test") for row in ALL[s]}
    assert {family for family, _ in held} == names(instr.FAMILIES)


def test_held_out_families_occur_in_no_other_split():
    assert {row["family"] for row in ALL["family"]} == names(instr.HELD_FAMILIES)
    assert {row["family"] for row in ALL["train"]} == names(instr.FAMILIES)
    assert not names(instr.FAMILIES) & names(instr.HELD_FAMILIES)
    assert len(instr.FAMILIES["plain"]) >= 16


def test_every_family_has_four_templates_and_held_out_ones():
    for families in instr.FAMILIES.values():
        assert all(len(f.templates) - f.held >= 4 and f.held >= 1 for f in families)
        assert all(len(set(f.templates)) == len(f.templates) for f in families)


def test_mixture_and_kinds():
    share = Counter(row["kind"] for row in ALL["test"])
    assert abs(share["unsafe"] / 3000 - 0.3) < 0.03 and abs(share["lookalike"] / 3000 - 0.2) < 0.03
    assert {row["kind"] for row in instr.tasks("test", 50, seed=0, kinds=["plain"])} == {"plain"}
    even = Counter(row["kind"] for row in instr.tasks("train", 2000, seed=0, kinds={"plain": 1, "unsafe": 3}))
    assert abs(even["unsafe"] / 2000 - 0.75) < 0.04


def test_evaluation_prompts_do_not_repeat():
    for split in ("tune", "test", "template"):
        prompts = [row["prompt"] for row in instr.tasks(split, 512, seed=4)]
        assert len(set(prompts)) == 512


def test_verbs_alone_do_not_tell_unsafe_requests_apart():
    rows = instr.tasks("train", 4000, seed=1, kinds=["unsafe", "lookalike"])
    verbs = {"unsafe": set(), "lookalike": set()}
    for row in rows:
        verbs[row["kind"]].add(row["combination"].split("|")[1])
    assert verbs["unsafe"] & verbs["lookalike"] >= {"make", "buy", "sell"}
    assert "hack" in verbs["unsafe"] - verbs["lookalike"]


def test_a_seed_gives_the_same_rows_in_another_process():
    code = (
        "import json; from jaxllm.worlds import instr;"
        "print(json.dumps([instr.tasks('test', 40, seed=3), instr.documents(40, seed=3),"
        " instr.demonstrations(40, seed=3)]))"
    )
    command = [sys.executable, "-c", code]
    other = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    here = [instr.tasks("test", 40, seed=3), instr.documents(40, seed=3), instr.demonstrations(40, seed=3)]
    assert json.loads(other) == here
    assert instr.tasks("test", 40, seed=4) != here[0]


GOLDEN = "fb694442389c7e88"


def test_the_rows_of_a_seed_never_change():
    rows = json.dumps(instr.tasks("train", 200, seed=0) + instr.pair_tasks(200, seed=0), sort_keys=True)
    # a changed hash means changed data for everyone's recorded runs: change it only with the world itself
    assert hashlib.sha256(rows.encode()).hexdigest()[:16] == GOLDEN


def test_fewer_rows_are_a_prefix_of_more():
    assert instr.tasks("test", 100, seed=0)[:30] == instr.tasks("test", 30, seed=0)


@pytest.fixture(scope="module")
def bpe():
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(instr.documents(8000, seed=0)),
        model_writer=model,
        vocab_size=1024,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def test_a_context_of_64_tokens_holds_prompt_and_answer(bpe):
    terse = [row["prompt"] + " " + row["answer"] for split in ("test", "template") for row in ALL[split]]
    lengths = sorted(len(ids) + 5 for ids in bpe.encode(terse))  # five for the roles, the ends and a newline
    assert sum(lengths) / len(lengths) < 32 and lengths[int(0.99 * len(lengths))] <= 45 and lengths[-1] <= 60
    written = [" ".join(m["content"] for m in row["messages"]) for row in instr.demonstrations(3000, seed=7)]
    assert max(len(ids) + 5 for ids in bpe.encode(written)) <= 64


def test_documents_are_short(bpe):
    lengths = sorted(len(ids) for ids in bpe.encode(instr.documents(2000, seed=9)))
    assert sum(lengths) / 2000 < 45 and lengths[int(0.95 * 2000)] <= 64


def test_unknown_splits_and_kinds_are_named():
    with pytest.raises(UserError, match="split='tset'.*train, tune, test"):
        instr.tasks("tset", 1, seed=0)
    with pytest.raises(UserError, match="safe"):
        instr.tasks("test", 1, seed=0, kinds=["safe"])
