"""The model card: its head is YAML that the hub reads, its numbers are the run's, and what is not known is not there."""

import pytest
import yaml

from jaxllm.convert.card import Adapter, Facts, Stage, card, positions
from jaxllm.models.decoder import DecoderConfig

CONFIG = DecoderConfig(vocab_size=50, max_length=32, d_model=16, n_layers=1, n_heads=2, d_ff=32)
PRETRAIN = Stage("pretrain", 600, {"batch_size": 32, "optim": {"lr": 3e-3}, "data": {"length": 64}}, "hf:org/texts:en")
SFT_CONFIG = {"batch_size": 8, "optim": {"lr": 1e-3}, "data": {"length": 32}}
SFT = Stage("sft", 10, SFT_CONFIG, "chats.jsonl", "python -m experiments.sft --config.seed=1")
PPO = Stage("ppo", 5, {"batch_size": 128, "data": {}}, "")
ALL = Facts(
    "mine", 1234, CONFIG, (PRETRAIN, SFT), "org/base", {"eval/loss": 1.25, "data/fill": 0.5},
    (
        {"name": "it answers", "value": 0.9, "bound": 0.5, "better": "more", "holds": True, "kind": "gate"},
        {"name": "kl", "value": 2.5, "bound": 2.0, "better": "less", "holds": False, "kind": "finding", "low": 2.1, "high": 2.9},
    ), {"jaxllm": "0.1.0"}, "abc", "apache-2.0",
)  # fmt: skip


def parts(text):
    """(the head, the body) of a card."""
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_everything_that_is_known_is_on_the_card():
    head, body = parts(card(ALL, "LlamaForCausalLM"))
    assert head == {
        "license": "apache-2.0", "base_model": "org/base", "datasets": ["org/texts"], "pipeline_tag": "text-generation",
        "library_name": "transformers", "metrics": ["loss"], "tags": ["jaxllm", "sft"],
    }  # fmt: skip
    for words in (
        "`LlamaForCausalLM` with 1,234 parameters", "a context of 32 tokens", "| `pretrain` | 600 | 32 | 0.003 | 1,228,800 |",
        "| `eval/loss` | 1.25 |", "- gate holds: it answers, 0.9 (bound >= 0.5)",
        "- finding does not hold: kl, 2.5 [2.1, 2.9] (bound <= 2)", "`chats.jsonl`", '"lr": 0.001',
        "# pretrain: its command was not recorded\npython -m experiments.sft --config.seed=1\n```", "commit abc",
        'hf.load("mine")', 'LlamaForCausalLM.from_pretrained("mine")',
    ):  # fmt: skip
        assert words in body, words
    assert "No licence" not in body and "built in" not in body


def test_what_is_not_known_is_left_out():
    head, body = parts(card(Facts("mine", 1, CONFIG, (PPO,), source="/models/base"), "SomethingElse"))
    assert head == {"library_name": "transformers", "tags": ["jaxllm", "ppo"]}
    assert "None: the run has no result for this checkpoint." in body and "# ppo: its command was not recorded" in body
    assert "not recorded |" in body and "No licence is stated" in body and "built into jaxllm" in body


LOW = Adapter(2, 4.0, "rslora", "attention/q", "org/base", "runs/sft", 96)


def test_adapters_say_what_they_are_for_as_peft_s_own_cards_do():
    head, body = parts(card(ALL._replace(adapter=LOW), "LlamaForCausalLM"))
    assert head["library_name"] == "peft" and head["base_model"] == "org/base" and head["pipeline_tag"] == "text-generation"
    assert head["tags"] == ["jaxllm", "sft", "lora", "base_model:adapter:org/base"]
    for words in (
        "LoRA of rank 2, alpha 4 and rslora scaling", "`attention/q`: 96 numbers, for a `LlamaForCausalLM` with 1,234 parameters",
        'PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("org/base"), "mine")', "--source=mine --base=org/base",
    ):  # fmt: skip
        assert words in body, words
    assert "hf.load" not in body and "BASE" not in body


def test_adapters_on_weights_that_were_trained_here_name_no_published_base():
    head, body = parts(card(ALL._replace(adapter=LOW._replace(base="")), "LlamaForCausalLM"))
    assert "base_model" not in head and head["tags"] == ["jaxllm", "sft", "lora"]
    assert "--source=runs/sft --target=BASE" in body and '"BASE"), "mine")' in body


def test_weights_that_were_only_taken_in_claim_no_training():
    taken = Stage("pretrain", 0, {"source": "org/base"}, "")
    body = parts(card(Facts("mine", 1, CONFIG, (taken,), "org/base"), "GPT2LMHeadModel"))[1]
    assert "trained on nothing" in body and "| stage |" not in body and "built in" not in body


def test_positions_are_counted_where_the_rows_have_one_length():
    assert positions(PRETRAIN) == 600 * 32 * 64 and positions(PPO) is None


def test_the_hub_reads_it_offline():
    hub = pytest.importorskip("huggingface_hub")
    read = hub.ModelCard(card(ALL, "LlamaForCausalLM"))
    assert read.data.license == "apache-2.0" and read.data.datasets == ["org/texts"] and "# mine" in read.text
