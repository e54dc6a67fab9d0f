"""What looks like a secret, and a whole run with secrets everywhere: no file and no line has one."""

import json
import os
import subprocess
import sys
import time

import pytest

from jaxllm.report import files, secrets
from jaxllm.report import run as runs
from tests.conftest import ROOT

# written in two parts, so that no scanner takes this file for a leak
SHAPED = [
    "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz01234567", "sk-" + "proj-abcdefghijklmnop1234",
    "ghp_" + "0123456789abcdefghij0123456789abcdef", "AKIA" + "IOSFODNN7EXAMPLE", "glpat-" + "abcdefghij0123456789",
    "github_pat_" + "11ABCDEFG0abcdefghijkl", "xoxb-" + "1234567890-abcdef",
    "AIza" + "SyA1234567890abcdefghijklmnopqrstuv", "eyJ" + "hbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl",
]  # fmt: skip
NAMES = (
    "token", "hf_token", "HF_TOKEN", "api_key", "apikey", "apiKey", "OPENAI_API_KEY", "WANDB_API_KEY", "secret", "client_secret",
    "password", "db.password", "PASSWD", "auth_token", "access_tokens", "aws_secret_access_key", "private_key", "hub.token",
    "--token", "--config.hub.api_key", "credentials", "x-api-key", "--hub.private-key", "auth-token",
)  # fmt: skip
TEXTS = (
    "num_tokens", "max_tokens", "cls_token", "eos_token", "bos_token", "pad_token", "tokens_per_step", "tokens_per_second",
    "tokenizer", "tokenizer.kind", "max_new_tokens", "tokens", "mask_token", "image_token", "token_ids", "pad_token_id", "keep",
    "key", "init", "monkey", "hockey", "author", "num_token", "eval/token_accuracy", "user_token", "stop_token", "eos-token",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_of_secrets(name):
    assert secrets.secret_name(name)
    assert secrets.redact({name: "any text"}) == {name: "***"} and secrets.redact({name: 12345}) == {name: "***"}
    assert secrets.redact({name: ""}) == {name: ""} and secrets.redact({name: None}) == {name: None}
    assert "any" not in secrets.clean_message(f"{name}=any") and "any" not in secrets.clean_message(f"{{'{name}': 'any'}}")


@pytest.mark.parametrize("name", TEXTS)
def test_names_that_speak_of_text(name):
    assert not secrets.secret_name(name)
    for value in ("<|end|>", 512, True, [1, 2], 1.5):
        assert secrets.redact({name: value}) == {name: value}
    for text in (f"--config.{name}=512", f"{{'{name}': '<|end|>'}}", f"{name}: 3", f"{name} = 7"):
        assert secrets.clean_message(text) == text


@pytest.mark.parametrize("value", SHAPED)
def test_shapes_of_secrets(value):
    for text in (value, f"a {value}, b", json.dumps({"x": value}), f"(got '{value}')", f"x={value}"):
        assert value not in secrets.clean(text) and value[:12] not in secrets.clean(text)
    assert secrets.clean(f"a {value}, b") == "a ***, b"


@pytest.mark.parametrize(
    "text,want",
    [
        ("https://me:pw@host/x", "https://***@host/x"),
        ("fetch https://abcdef@host", "fetch https://***@host"),
        ("Authorization: Bearer abcdefghijklmnop", "Authorization: ***"),
        ("gs://bucket/a@2", "gs://bucket/a@2"),
        ("me@example.org at https://host/x?y=1", "me@example.org at https://host/x?y=1"),
        ("hf_transfer and sk-learn; task-oriented-dialogue-systems", "hf_transfer and sk-learn; task-oriented-dialogue-systems"),
        ("step 3: loss: 1.5, the unknown token: 'x', key: k", "step 3: loss: 1.5, the unknown token: 'x', key: k"),
        ("password: hunter", "password: ***"),
        ("connect(user='u', password='hunter 2', port=3)", "connect(user='u', password='***', port=3)"),
        ('{"api_key": "k\\"k", "n": 1}', '{"api_key": "***", "n": 1}'),
    ],
)
def test_text(text, want):
    assert secrets.clean_message(text) == want


def test_a_text_of_any_length_takes_linear_time():
    cases = ("a" * 500_000, "a=" * 200_000, "://" * 200_000, "eyJ" * 100_000, "eyJ-" * 100_000, "'" * 300_000, "a.-" * 100_000)
    for text in cases:
        begun = time.monotonic()
        secrets.clean_message(text)
        assert time.monotonic() - begun < 5


def test_a_value_that_is_known_is_hidden_however_it_is_written(monkeypatch):
    value = "pä\"s's <&> wörd"
    monkeypatch.setattr(secrets, "_known", set())
    monkeypatch.setenv("WANDB_API_KEY", "plain-looking-value")
    secrets.remember({"hub": {"password": value, "num_tokens": "many of them"}, "secrets": {"inner": ["deep value"]}})
    secrets.remember(arguments=["--token", "first-word", "--verbose", "--config.x.api_key=second-word", "--eos_token=</s>"])
    import html

    for text in (value, json.dumps(value), json.dumps(value, ensure_ascii=False), repr(value), html.escape(value)):
        assert secrets.clean(f"x {text} y").replace('"', "").replace("'", "") == "x *** y", text
    assert secrets.clean("deep value, first-word, second-word, plain-looking-value") == "***, ***, ***, ***"
    assert secrets.clean("many of them </s> --verbose") == "many of them </s> --verbose"


def test_every_file_goes_through_the_joint(tmp_path):
    files.write_atomic(tmp_path / "a", f"x {SHAPED[0]}")
    assert (tmp_path / "a").read_text() == "x ***"
    run = runs.open_run(tmp_path / "r", "toy", {"hub": {"token": "tok"}, "max_tokens": 3, "note": SHAPED[1]})
    assert run.config == {"hub": {"token": "***"}, "max_tokens": 3, "note": "***"}  # what a checkpoint's meta gets


# ---- a whole run

VALUES = {"config": "open sesame 1", "argv": "swordfish-22", "environment": "correct horse battery", "message": SHAPED[0]}
CONFIG = f"""
import ml_collections
from configs import pretrain

def get_config(variant=None):
    c = pretrain.get_config()
    c.hub = ml_collections.ConfigDict(dict(api_key={VALUES["config"]!r}, password="", eos_token="</s>", num_tokens=7))
    return c
"""
PROGRAM = """
import os, sys
from experiments import pretrain
from jaxllm import launch

def main(config, run, train=False, fail=False):
    everything = " | ".join([config.hub.api_key, config.hub.password, os.environ["WANDB_API_KEY"], os.environ["SHAPED"]])
    run.warn("careful: " + everything)
    run.note("note: " + everything)
    run.sample(1, "prompt " + everything, everything, more=everything)
    if train:
        pretrain.main(config, run)
    if fail:
        raise RuntimeError(f"the hub refused {everything} and {dict(config.hub)}")
    run.log(1, {"train/loss": 1.0, "num_tokens": 7})
    run.finish({"x": 1.0, "said": everything}, findings=everything)

launch.run(main, "pretrain", flags={"train": False, "fail": False})
"""


def started(tmp_path, *flags):
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "WANDB_API_KEY": VALUES["environment"], "SHAPED": VALUES["message"], "PYTHONPATH": str(ROOT)}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
    given = [f"--config={tmp_path / 'config.py'}", f"--config.hub.password={VALUES['argv']}", f"--workdir={tmp_path / 'run'}"]
    command = [sys.executable, str(tmp_path / "program.py"), *given, *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def leaks(tmp_path, done):
    """Where a secret stands: files of the run, stdout, stderr."""
    texts = {str(p): p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    texts |= {"stdout": done.stdout.encode(), "stderr": done.stderr.encode()}
    return [(where, kind) for where, text in texts.items() for kind, value in VALUES.items() if value.encode() in text]


def test_a_run_that_ends_well_keeps_its_secrets(tmp_path):
    done = started(tmp_path, "--debug")
    assert done.returncode == 0, done.stderr
    assert leaks(tmp_path, done) == []
    found = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"config.json", "env.json", "README.txt", "log.txt", "samples.jsonl", "metrics.jsonl", "report.html"} <= found
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["hub"] == {"api_key": "***", "password": "***", "eos_token": "</s>", "num_tokens": 7}
    assert "***" in (tmp_path / "run" / "README.txt").read_text() and "careful: *** | ***" in done.stderr
    again = started(tmp_path)  # and it is known again
    assert again.returncode == 0 and "is finished: nothing to do" in again.stdout, again.stderr


@pytest.mark.parametrize("flags", [(), ("--debug",)])
def test_a_run_that_crashes_keeps_its_secrets(flags, tmp_path):
    done = started(tmp_path, "--fail", *flags)
    assert done.returncode == 70 and "the hub refused *** | ***" in done.stderr
    crash = (tmp_path / "run" / "crash" / "traceback.txt").read_text()
    assert "the hub refused ***" in crash and "raise RuntimeError" in crash
    assert leaks(tmp_path, done) == []


@pytest.mark.slow
def test_a_checkpoint_has_no_secrets_either(tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"the cat sat on mat number {i}"}) + "\n" for i in range(60)))
    small = {"model.d_model": 32, "model.n_heads": 4, "model.d_ff": 64, "model.n_layers": 2, "model.max_length": 64}
    small |= {"data.length": 32, "data.path": text, "tokenizer": "byte", "batch_size": 4, "steps": 2}
    done = started(tmp_path, "--train", *(f"--config.{name}={value}" for name, value in small.items()))
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run" / "checkpoints").glob("2/meta")) and leaks(tmp_path, done) == []
