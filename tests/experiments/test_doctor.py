"""The doctor passes on what is shipped, says what it made small, and leaves with the code that scripts read."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.doctor import __main__ as command
from experiments.doctor import answers, battery, data, inner, numbers, small
from jaxllm import settings
from jaxllm.core.types import UserError
from jaxllm.data import chat, pack
from jaxllm.data import tokenizer as tokenizers
from jaxllm.data.text import read_rows
from tests.experiments.conftest import TINY

CONFIGS = sorted(p.stem for p in settings.CONFIGS.glob("*.py") if p.stem not in ("__init__", "common"))
ROUNDS = ("iterative_dpo", "rlaif", "rejection_sampling", "quickstart")


def examined(experiment, tmp_path, only=(), **changes):
    config = settings.load_config(settings.config_path(experiment))
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    found, said = [], []
    battery.run(config, experiment, tmp_path / "run", found.append, said.append, only)
    return {v.name: v for v in found}, said


def failed(found):
    return {name: v for name, v in found.items() if v.ok is False}


def test_pretraining_passes_and_is_rehearsed_to_its_export(files, tmp_path):
    given = {k: v for k, v in TINY.items() if not k.startswith("mesh")}
    found, said = examined("pretrain", tmp_path, **given, **{"data.path": files["text"]})
    assert list(found) == battery.check_names() and not failed(found), failed(found)
    assert "exported as LlamaForCausalLM" in found["rehearsal"].said
    holding = {name for name, v in found.items() if v.ok}
    assert {"padding", "packed = separate", "accumulation", "mesh 1 = mesh n", "cache = full"} <= holding
    assert not said
    assert (tmp_path / "run" / "result.json").exists() and not (tmp_path / "run" / "export").exists()


@pytest.mark.parametrize(
    "only",
    [
        ["bfloat16 drift", "merged = unmerged"],
        pytest.param(["sampler = trainer", "parameters move", "gradients", "rehearsal"], marks=pytest.mark.slow),
    ],
)
def test_adapters_of_sft_pass(only, base, files, tmp_path):
    """Whose `fit` is given the adapted model; that of `dpo` is given the plain one."""
    more = {"batch_size": 8, "data.length": 32, "lora.rank": 2, "init": str(base), "data.path": files["chat"]}
    found, _ = examined("sft", tmp_path, only, **more)
    assert list(found) in (only, [*only, "rehearsal"]) and all(found[name].ok is True for name in only), found


def test_adapters_of_dpo_pass(base, files, tmp_path):
    more = {"batch_size": 8, "data.length": 32, "lora.rank": 2, "init": str(base), "data.path": files["pairs"]}
    only = ["merged = unmerged", "start at the reference", "parameters move", "gradients"]
    found, _ = examined("dpo", tmp_path, only, **more)
    assert [v.ok for v in found.values()] == [True] * 4, found


PUSHED = ("sft", "dpo", "grpo")  # the others, a quarter of an hour, by hand or nightly: -m soak


TIER = {x: pytest.mark.slow if x in PUSHED else pytest.mark.soak for x in CONFIGS}


@pytest.mark.parametrize("experiment", [pytest.param(x, marks=TIER[x]) for x in CONFIGS])
def test_every_shipped_config_passes(experiment, tmp_path):
    found, said = examined(experiment, tmp_path)
    assert not failed(found), failed(found)
    assert sum(v.ok is True for v in found.values()) >= 2
    assert any("trains with experiments" in line for line in said) == (experiment in ROUNDS)


def test_a_published_size_is_made_small_and_a_users_file_is_not():
    config = settings.load_config(settings.config_path("pretrain"), "llama3.2-1b")
    changes = small.changes(config)
    assert changes["model.d_model"] <= 64 and changes["model.n_layers"] == 2 and changes["batch_size"] == 8
    assert config.model.n_heads % config.model.n_kv_heads == 0 and 4 % changes["model.n_kv_heads"] == 0
    assert "data.characters" in changes
    with config.unlocked():
        config.data.path = "corpus.jsonl"
    assert not {"data.characters", "data.length"} & small.changes(config).keys()
    assert not {n for n in small.changes(settings.load_config(settings.config_path("pretrain"))) if n.startswith("model")}


def test_rounds_are_examined_as_what_they_train_with():
    config = settings.load_config(settings.config_path("iterative_dpo"))
    with config.unlocked():
        config.beta, config.lr, config.init = 0.7, 3e-5, "runs/x"
    name, own, said = inner.of("iterative_dpo", config)
    assert (name, own.beta, own.optim.lr, own.init) == ("dpo", 0.7, 3e-5, "runs/x") and "experiments.dpo" in said
    with pytest.raises(UserError, match="did you mean pretrain"):
        inner.of("pretrian", config)


def test_the_command_leaves_with_2_and_says_what_to_do(base, files, tmp_path, capsys):
    argv = [
        "--config=configs/sft.py", f"--config.init={base}", f"--config.data.path={files['chat']}", "--config.batch_size=8",
        "--config.data.length=13", "--only=truncated, rows trained,end trained", f"--out={tmp_path / 'doctor.json'}",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as left:
        command.run(argv)
    assert left.value.code == 2
    out = capsys.readouterr()
    assert "FAILED          truncated" in out.out
    assert "raise config.data.length" in out.err and "Traceback" not in out.err
    record = json.loads((tmp_path / "doctor.json").read_text())
    assert "truncated" in record["failed"] and record["experiment"] == "sft"
    assert {"number", "tolerance", "do"} <= record["checks"][0].keys()
    command.run([*argv[:4], "--config.data.length=32", "--only=truncated,rows trained"])
    assert "2 checks hold, 0 do not apply" in capsys.readouterr().out


def test_a_misspelt_check_gets_the_nearest(base, files, capsys):
    with pytest.raises(SystemExit) as left:
        command.run(["--config=configs/sft.py", "--only=paddin"])
    assert left.value.code == 2 and "did you mean 'padding'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"data.path": "broken.jsonl"}, "broken.jsonl:2"), ({"data.path": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"init": "runs/nowhere"}, "runs/nowhere: no such run directory"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_a_line_and_leaves_nothing_behind(wrong, said, base, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "comp\n')
    given = {"init": base, "data.path": files["chat"], **wrong}
    with pytest.raises(SystemExit) as left:
        command.run([f"--config={settings.config_path('sft')}", *(f"--config.{name}={value}" for name, value in given.items())])
    out = capsys.readouterr()
    assert left.value.code == 2 and "FAILED          rehearsal" in out.out and said in out.out
    assert "Traceback" not in out.out + out.err and [p.name for p in tmp_path.iterdir()] == ["broken.jsonl"]


@pytest.mark.slow
def test_a_fresh_model_excuses_only_what_it_has_said(tmp_path):
    """Samples of a fresh model may give no pair; a prompt that is too long is the user's, with any model."""
    found, _ = examined("pairs", tmp_path, max_prompt=1)
    assert found["rehearsal"].ok is False and "max_prompt=1" in found["rehearsal"].said


def test_a_file_that_cannot_be_written_is_named_first(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        command.run(["--config=configs/sft.py", f"--out={tmp_path / 'no' / 'doctor.json'}"])
    assert left.value.code == 2 and "there is no directory" in capsys.readouterr().err


# ---- how checks compare


def packed_rows():
    tokenizer = tokenizers.byte_tokenizer()
    talk = [[{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd" * n}] for n in (1, 2, 3, 1)]
    return pack.pack([chat.encode_chat(tokenizer, m) for m in talk], 32)[0], tokenizer


def test_unpacked_rows_hold_the_same_examples_in_the_same_order():
    record, _ = packed_rows()
    assert record["segments"].max() > 1
    alone = numbers.unpacked(record)
    assert alone["segments"].max() == 1 and len(alone["tokens"]) == sum(row.max() for row in record["segments"])
    for name in ("tokens", "targets", "mask"):
        assert (alone[name][alone["segments"] != 0] == record[name][record["segments"] != 0]).all()


def test_answers_are_found_by_their_role_tokens():
    record, tokenizer = packed_rows()
    assert (answers.answering(record, *answers.markers(tokenizer))[0] == record["mask"]).all()
    assert data.lengths(record).sum() == (record["segments"] != 0).sum()


def test_padding_widens_records_only():
    side = {name: jnp.ones((2, 4), jnp.int32) for name in ("tokens", "segments")}
    batch = {"chosen": side, "ref": jnp.ones(2), "wide": jnp.ones((2, 4))}
    wide = numbers.padded(batch, 3)
    assert wide["chosen"]["tokens"].shape == (2, 7) and wide["ref"].shape == (2,) and wide["wide"].shape == (2, 4)
    assert np.asarray(numbers.padded(batch, 3, left=True)["chosen"]["segments"])[0].tolist() == [0, 0, 0, 1, 1, 1, 1]


def test_difference_is_relative_to_the_first():
    a = {"x": jnp.array([3.0, 4.0])}
    assert numbers.apart(a, {"x": jnp.array([3.0, 4.5])}) == pytest.approx(0.1)
    assert np.isnan(numbers.apart(a, {"x": jnp.array([3.0, jnp.nan])}))


def test_made_up_pairs_differ(tmp_path):
    rows = read_rows(f"{small.made_up(tmp_path / 'pairs', 0)}/train.jsonl")
    assert len(rows) > 64 and all(r["chosen"] != r["rejected"] and r["prompt"] for r in rows)
