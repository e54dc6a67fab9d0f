"""Runs to published directories and back from the command line, and training that starts from published weights."""

import json
import shutil

import jax
import numpy as np
import pytest

from experiments import convert, model_card, sft
from jaxllm import launch
from jaxllm.convert import hf
from jaxllm.convert.card import Stage
from jaxllm.core.tree import flatten
from jaxllm.core.types import UserError
from jaxllm.data import tokenizer as tokenizers
from jaxllm.models import decoder
from tests.convert.shapes import LLAMA
from tests.models.tiny import weights


def same(a, b):
    a, b = flatten(a), flatten(b)
    return a.keys() == b.keys() and all(np.array_equal(a[p], b[p]) for p in a)


@pytest.fixture(scope="module")
def exported(base, tmp_path_factory):
    target = tmp_path_factory.mktemp("export") / "sft"
    convert.main(source=str(base), target=str(target), stage="sft")
    return target


def rows(params, n):
    """Without the rows that pad the vocabulary: training moves them, and an export drops them."""
    return {**params, "embed": {**params["embed"], "tokens": params["embed"]["tokens"][:n]}}


def test_a_run_becomes_a_published_directory(base, exported):
    loaded = launch.load(base, "sft")
    assert json.loads((exported / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    model, params = hf.load(exported)
    n = loaded.tokenizer.vocab_size
    assert same(rows(params, n), rows(loaded.params["policy"], n))
    assert tokenizers.fingerprint(tokenizers.load(exported)) == loaded.meta["tokenizer"]
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [loaded.tokenizer.specials["end"], loaded.tokenizer.specials["eos"]]


def test_an_export_has_a_card_with_the_run_s_own_numbers(base, exported):
    text = (exported / "README.md").read_text()
    result = json.loads((base / "sft" / "result.json").read_text())
    numbers = [f"| `{name}` | {value:.6g} |" for name, value in result["metrics"].items()]
    trained = [f"| `{stage}` | 3 | 8 |" for stage in ("pretrain", "sft")]
    commands = "\n".join(json.loads((base / stage / "env.json").read_text())["command"] for stage in ("pretrain", "sft"))
    assert numbers and all(words in text for words in (*numbers, *trained, commands, str(base), "No licence is stated"))


def test_the_card_of_an_earlier_step_has_no_numbers_of_the_last(base, tmp_path):
    loaded = launch.load(base, "sft")
    facts = model_card.facts_of(loaded._replace(step=1), tmp_path / "x", license="mit")
    assert facts.metrics is None and facts.license == "mit" and [s.experiment for s in facts.lineage] == ["pretrain", "sft"]


def test_a_run_that_trained_the_stage_before_itself_says_so(base, tmp_path):
    own = tmp_path / "mine"
    shutil.copytree(base / "sft", own)
    shutil.copytree(base / "pretrain", own / "pretrain")
    loaded = launch.load(own)
    without = {**loaded.meta, "config": {**loaded.meta["config"], "init": ""}}
    stages, _ = model_card.lineage(without, own)
    assert [s.experiment for s in stages] == ["pretrain", "sft"] and stages[0].step == 3
    assert [s.experiment for s in model_card.lineage(without, base / "sft")[0]] == ["sft"]


def test_adapters_are_for_published_weights_only_where_nothing_was_trained_between(exported, tmp_path):
    convert.main(source=str(exported), target=str(tmp_path / "taken"), kind="sft")
    loaded, low = launch.load(tmp_path / "taken"), {"rank": 2, "alpha": 4.0, "match": "q", "scaling": "standard"}
    loaded = loaded._replace(meta={**loaded.meta, "lora": {"policy": low}})
    before, last = Stage("sft", 0, {}, ""), Stage("dpo", 5, {}, "")
    assert model_card.adapter_of(loaded, (before, last), "org/base").base == "org/base"
    assert model_card.adapter_of(loaded, (before._replace(step=1), last), "org/base").base == ""
    assert model_card.adapter_of(loaded, (before, last), "/a/directory").base == ""


def test_a_published_directory_becomes_a_run_that_trains(exported, files, tmp_path):
    convert.main(source=str(exported), target=str(tmp_path / "run"), kind="sft")
    back, (_, params) = launch.load(tmp_path / "run"), hf.load(exported)
    assert back.step == 0 and back.meta["experiment"] == "sft"
    assert same(back.params["policy"], params)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    settings = {"steps": 2, "batch_size": 8, "data.path": files["chat"], "data.length": 32, "init": str(tmp_path / "run")}
    result = launch.start(sft.main, "sft", {**settings, "log_every": 1}, tmp_path / "next")
    assert np.isfinite(result["metrics"]["eval/loss"])
    after = launch.load(tmp_path / "next").params["policy"]
    assert 0 < max(jax.tree.leaves(jax.tree.map(lambda a, b: float(abs(a - b).max()), after, back.params["policy"]))) < 0.1
    convert.main(source=str(tmp_path / "run"), target=str(tmp_path / "again"))
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()


def test_a_chat_template_comes_along(exported, tmp_path):
    before = (exported / "chat_template.jinja").read_text()
    (exported / "chat_template.jinja").write_text("{{ messages }}")
    try:
        convert.main(source=str(exported), target=str(tmp_path / "run"))
    finally:
        (exported / "chat_template.jinja").write_text(before)
    assert (tmp_path / "run" / "tokenizer" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert launch.load(tmp_path / "run").meta["experiment"] == "pretrain"
    convert.main(source=str(tmp_path / "run"), target=str(tmp_path / "again"))
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_link_that_leaves_the_directory_is_refused(exported, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (exported / "chat_template.jinja").rename(tmp_path / "kept")
    (exported / "chat_template.jinja").symlink_to(tmp_path / "secret")
    try:
        with pytest.raises(UserError, match="leads out of the directory"):
            convert.main(source=str(exported), target=str(tmp_path / "run"))
    finally:
        (tmp_path / "kept").rename(exported / "chat_template.jinja")
    assert not (tmp_path / "run").exists()


def test_pickled_weights_are_named_first(exported, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("config.json", "model.safetensors"):
        target = tmp_path / "in" / name.replace("model.safetensors", "pytorch_model.bin")
        target.write_bytes((exported / name).read_bytes())
    with pytest.raises(UserError, match="pytorch_model.bin may run code"):
        convert.main(source=str(tmp_path / "in"), target=str(tmp_path / "run"))


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    model = decoder.make(LLAMA)
    hf.save(tmp_path / "a", model, weights(model.specs))
    with pytest.raises(UserError, match="not a tokenizer"):
        convert.main(source=str(tmp_path / "a"), target=str(tmp_path / "run"))
    tokenizers.save(tokenizers.byte_tokenizer(), tmp_path / "a")
    with pytest.raises(UserError, match="262 ids, its weights 50"):
        convert.main(source=str(tmp_path / "a"), target=str(tmp_path / "run"))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "flags,words",
    [
        ({"source": "", "target": "x"}, "give --source and --target"),
        ({"source": "no/such/place", "target": "x"}, "no such run directory"),
        ({"source": "org/name", "target": "x"}, "org/name: offline"),
        ({"source": "EXPORTED", "target": "x", "dtype": "bfloat16"}, "exports of a run"),
        ({"source": "EXPORTED", "target": "x", "kind": "toy"}, "--kind=toy: choose one of pretrain"),
        ({"source": "EXPORTED", "target": "EXPORTED"}, "is there and not empty"),
        ({"source": "BASE", "target": "EXPORTED", "stage": "sft"}, "is there and not empty"),
        ({"source": "BASE", "target": "x", "stage": "sft", "architecture": "GPT2LMHeadModel"}, "no published architecture"),
    ],
)
def test_mistakes_are_said(flags, words, base, exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    flags = {k: {"EXPORTED": str(exported), "BASE": str(base)}.get(v, v) for k, v in flags.items()}
    with pytest.raises(UserError, match=words):
        convert.main(**flags)
    assert list(tmp_path.iterdir()) == []
