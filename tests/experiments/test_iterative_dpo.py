"""Rounds of preferences on a policy's own samples, two small ones each: iterative DPO and the recipes of AI feedback."""

import json

import numpy as np
import pytest

from experiments import iterative_dpo, pretrain, rlaif, rubric, sft
from jaxllm import launch
from jaxllm.core import ops
from jaxllm.core.types import UserError
from jaxllm.data import chat
from jaxllm.data import tokenizer as tokenizers
from jaxllm.models import decoder
from tests.experiments.conftest import TINY, write_rows
from tests.models.tiny import weights

SMALL = {
    "rounds": 2, "prompts": 8, "samples": 2, "steps": 1, "batch_size": 4, "sample_batch": 8, "max_new_tokens": 8,
    "temperature": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def start(files, tmp_path_factory):
    """A fine-tuned model whose context holds a rating question in bytes."""
    root = tmp_path_factory.mktemp("rounds")
    size = {**TINY, "model.d_model": 16, "model.n_heads": 2, "model.max_length": 512}
    launch.start(pretrain.main, "pretrain", {**size, "steps": 2, "data.path": files["text"]}, root / "pretrain")
    given = {"steps": 2, "batch_size": 8, "data.path": files["chat"], "data.length": 32, "init": str(root)}
    launch.start(sft.main, "sft", given, root / "sft")
    return str(root / "sft")


def pairs_of(workdir, index):
    path = workdir / "data" / f"round{index}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rounds_draw_from_the_latest_policy_with_itself_as_the_reference(start, tmp_path):
    result = launch.start(iterative_dpo.main, "iterative_dpo", {**SMALL, "init": start}, tmp_path / "run")
    metrics = result["metrics"]
    assert {"start/gold", "round1/pairs", "round2/held_out/gold", "round2/held_out/kl"} <= metrics.keys()
    assert metrics["start/kl"] == pytest.approx(0, abs=1e-3)
    second = json.loads((tmp_path / "run" / "round2" / "config.json").read_text())
    assert second["init"] == str(tmp_path / "run" / "round1")
    rows = pairs_of(tmp_path / "run", 1)
    assert len(rows) == metrics["round1/pairs"] and all(r["chosen"] != r["rejected"] for r in rows)


def test_prompts_of_preference_rows_and_a_verifier_of_ones_own(start, files, tmp_path):
    judge = tmp_path / "mine.py"
    judge.write_text("def shorter(row):\n    return -len(row['completion'])\n")
    given = {**SMALL, "rounds": 1, "init": start, "data.path": files["pairs"], "judge": "rewards"}
    result = launch.start(iterative_dpo.main, "iterative_dpo", {**given, "rewards": f"{judge}:shorter"}, tmp_path / "run")
    assert "round1/held_out/kl" in result["metrics"] and "start/gold" not in result["metrics"]
    assert all(len(r["chosen"]) < len(r["rejected"]) for r in pairs_of(tmp_path / "run", 1))


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"judge": "me"}, "config.judge='me': choose one of annotator"),
        ({"select": "all"}, "choose one of best_and_worst"),
        ({"samples": 1}, "a pair needs 2 or more"),
    ],
)
def test_settings_are_checked_first(settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        launch.start(iterative_dpo.main, "iterative_dpo", settings, tmp_path / "run")


def test_the_annotator_knows_its_world_alone(start, files, tmp_path):
    given = {**SMALL, "init": start, "data.path": files["prompts"]}
    with pytest.raises(UserError, match="annotator knows the instr world alone"):
        launch.start(iterative_dpo.main, "iterative_dpo", given, tmp_path / "run")
    chat_rows = {**given, "data.path": write_rows(tmp_path / "text.jsonl", [{"text": "a"}])}
    with pytest.raises(UserError, match="text.jsonl:1: fresh completions need a `prompt`"):
        launch.start(iterative_dpo.main, "iterative_dpo", chat_rows, tmp_path / "other")


@pytest.mark.parametrize("recipe", ["zephyr", "self_rewarding", "constitutional"])
def test_ai_feedback(recipe, start, tmp_path):
    given = {**SMALL, "rounds": 1, "init": start, "judge_rows": 16, "judge_steps": 2, "judge_length": 256}
    result = launch.start(rlaif.main, "rlaif", given, tmp_path / "run", variant=recipe)
    metrics = result["metrics"]
    assert 1 <= metrics["round1/score"] <= 5 and "round1/held_out/gold" in metrics
    if recipe == "self_rewarding":
        assert json.loads((tmp_path / "run" / "round1" / "config.json").read_text())["init"] == str(tmp_path / "run" / "judge")
    questions = (tmp_path / "run" / "data" / "ratings.jsonl").read_text()
    assert "rate its truthfulness, 1 to 5:" in questions and "rewrite it for more" in questions


def test_the_expected_rating_is_that_of_the_five_tokens():
    tokenizer = tokenizers.byte_tokenizer()
    model = decoder.make(decoder.DecoderConfig(tokenizer.vocab_size, d_model=16, n_layers=1, n_heads=2, d_ff=16))
    params = weights(model.specs)
    questions = ["rate it one", "rate it five four three"]
    got = rubric.make_judge(model, tokenizer, 2)(params, questions)
    before, ids = rubric.levels_of(tokenizer)
    for question, rating in zip(questions, got, strict=True):
        tokens = np.array([[*chat.prompt_ids(tokenizer, question), *before]])
        logits = np.asarray(ops.logits(model.head(params), model.apply(params, tokens).hidden))[0, -1, ids].astype(np.float64)
        p = np.exp(logits - logits.max())
        assert rating == pytest.approx((p / p.sum()) @ np.arange(1, 6), abs=1e-4)
    assert got[0] != got[1]


def test_agreement_counts_pairs_with_unlike_gold():
    scores = np.array([[1.0, 2.0, 2.0], [3.0, 1.0, 2.0]])
    gold = np.array([[0.0, 1.0, 0.5], [1.0, 1.0, np.nan]])
    # row 1: (0,1) right, (0,2) right, (1,2) tied in scores; row 2: equal gold, and two that are not known
    assert rubric.pair_agreement(scores, gold) == pytest.approx(2.5 / 3)
