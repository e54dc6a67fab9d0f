"""The error messages that users meet: each says what, which value and how to fix it, and what it suggests works.

One test a message: the situation gives its line and its exit code, in no test a traceback; then the fix that the line names is
carried out. Elsewhere: 10, a loss that is not finite (tests/experiments/test_replay.py), 12, no TPU in Colab
(tests/train/test_chips.py), and 16, a port in use (tests/experiments/serve).
"""

import errno
import importlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from experiments import dpo, memory, pretrain, sft
from jaxllm import launch, settings
from jaxllm.core.types import UserError
from jaxllm.data import tokenizer as tokenizers
from jaxllm.models import decoder
from jaxllm.report import run as runs
from jaxllm.train import fit_memory
from tests.conftest import ROOT
from tests.experiments.conftest import TINY, write_rows

SFT = {"steps": 1, "batch_size": 8, "data.length": 32, "log_every": 1}


@pytest.fixture
def command(capsys):
    """command(main, experiment, settings, *words) -> (exit code, stderr); no traceback, and one line a mistake."""

    def call(main, experiment, given, *words):
        argv = [f"--config.{name}={value}" for name, value in given.items()] + list(words)
        capsys.readouterr()
        try:
            launch.run(main, experiment, argv=argv)
            code = 0
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr().err
        assert "Traceback" not in said and (code == 0 or said.count("error: ") == len(said.strip().splitlines()) == 1), said
        return code, said.strip()

    return call


def flags_in(message):
    """{setting: value} of the flags that a message names."""
    return dict(re.findall(r"--config\.([\w.]+)=([^\s,;)]+)", message))


def parsed(*argv):
    return settings.parse(list(argv), "pretrain", {}).config


def test_1_an_unknown_setting(command):
    code, said = command(pretrain.main, "pretrain", {"modle.d_modl": 4})
    assert code == 2 and said == (
        "error: Unknown setting --config.modle.d_modl=4. Did you mean --config.model.d_model? (try --config.model.d_model=4). "
        "See all: --help-config model"
    )
    assert parsed(re.search(r"\(try (.*?)\)", said)[1]).model.d_model == 4
    assert "d_model" in settings.help_config(said.split("See all: ")[1].split(), "pretrain")


def test_2_a_word_that_is_no_flag(command):
    code, said = command(pretrain.main, "pretrain", {}, "steps=3")
    assert code == 2
    assert said == 'error: "steps=3" is not a flag and would have been ignored. Did you mean --config.steps=3 ?'
    assert parsed(said.split("Did you mean ")[1].removesuffix(" ?")).steps == 3


@pytest.mark.parametrize("given", [{"n_heads": 6, "d_model": 128}, {"n_heads": 12, "d_model": 128, "n_kv_heads": 4}])
def test_3_heads_that_do_not_divide(command, tmp_path, given):
    code, said = command(pretrain.main, "pretrain", {f"model.{n}": v for n, v in given.items()}, f"--workdir={tmp_path / 'run'}")
    assert code == 2 and f"model.n_heads={given['n_heads']} does not divide model.d_model=128: use " in said
    fixes = [(name, int(v)) for name, values in re.findall(r"(n_heads|d_model)=([\d or]+)", said.split("use ")[1])
             for v in re.findall(r"\d+", values)]  # fmt: skip
    assert len(fixes) == 4 and {name for name, _ in fixes} == {"n_heads", "d_model"}
    for name, value in fixes:
        decoder.validate(decoder.DecoderConfig(**{"vocab_size": 64, **given, name: value}))


def test_4_a_role_that_is_none(command, tmp_path, base):
    rows = [{"prompt": "say cat", "completion": "cat"} for _ in range(199)]
    rows.insert(3, {"messages": [{"role": "user", "content": "hi"}, {"role": "asistant", "content": "ho"}]})
    path = write_rows(tmp_path / "chat.jsonl", rows)
    given = {**SFT, "init": base, "data.path": path}
    code, said = command(sft.main, "sft", given, f"--workdir={tmp_path / 'run'}")
    assert code == 2 and said == (
        f'error: {path}:4, messages: message 2 has the unknown role "asistant": did you mean "assistant"? (fix that row, or '
        "leave out 1 of 200 rows with --config.data.on_error=skip)"
    )
    assert command(sft.main, "sft", given | flags_in(said), f"--workdir={tmp_path / 'run'}")[0] == 0
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())[f"left out of {path}"]
    assert (report["rows"], report["of"], report["errors"][0].split(", ")[0]) == (1, 200, f"{path}:4")
    assert "1 of 200 rows were left out" in (tmp_path / "run" / "log.txt").read_text()
    Path(path).write_text(Path(path).read_text().replace("asistant", "assistant"))
    assert command(sft.main, "sft", given, f"--workdir={tmp_path / 'fixed'}")[0] == 0


def test_5_data_of_another_stage(command, files, base, tmp_path):
    given = {**SFT, "init": base, "data.path": files["chat"]}
    code, said = command(dpo.main, "dpo", given, f"--workdir={tmp_path / 'run'}")
    assert code == 2 and f"{files['chat']}:1 looks like SFT data (columns: prompt, completion)" in said
    assert "preferences need `chosen` and `rejected`" in said and "use python -m experiments.sft" in said
    assert command(sft.main, "sft", given, f"--workdir={tmp_path / 'sft'}")[0] == 0


def test_6_a_tokenizer_that_is_not_the_models(base, tmp_path):
    run = shutil.copytree(base / "sft", tmp_path / "sft")
    own = shutil.copytree(run / "tokenizer", tmp_path / "own")
    right, other = tokenizers.load(own), tokenizers.train_sentencepiece(["some words of another text " * 9] * 9, 300)
    shutil.rmtree(run / "tokenizer")
    tokenizers.save(other, run / "tokenizer")
    with pytest.raises(UserError) as error:
        launch.load(run)
    said, (have, want) = str(error.value), (tokenizers.fingerprint(t)[:12] for t in (other, right))
    assert said == (
        f"{run / 'tokenizer'}: its hash {have} (300 ids) is not the {want} ({right.vocab_size} ids) that the checkpoint was "
        "trained with: put the run's own tokenizer back"
    )
    shutil.rmtree(run / "tokenizer")
    shutil.copytree(own, run / "tokenizer")
    assert launch.load(run).tokenizer.vocab_size == right.vocab_size


def test_7_a_damaged_checkpoint(files, tmp_path, capsys):
    launch.start(pretrain.main, "pretrain", {**TINY, "steps": 2, "save_every": 1, "data.path": files["text"]}, tmp_path / "run")
    steps = tmp_path / "run" / "checkpoints"
    file = max((p for p in (steps / "2" / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    assert launch.load(tmp_path / "run").step == 1, "the older one is used without being asked for"
    heard = capsys.readouterr()
    said = heard.out + heard.err
    assert "damaged" in said and file.name in said and re.search(r"crc32 [0-9a-f]{8}.*[0-9a-f]{8}", said), said
    assert "2.corrupt" in said and (steps / "2.corrupt").is_dir() and not (steps / "2").exists()
    launch.load(tmp_path / "run")
    assert "damaged" not in capsys.readouterr().out


def test_8_other_settings_for_a_run_that_has_begun(command, files, tmp_path):
    where, given = f"--workdir={tmp_path / 'run'}", {**TINY, "steps": 1, "data.path": files["text"]}
    assert command(pretrain.main, "pretrain", given, where)[0] == 0
    code, said = command(pretrain.main, "pretrain", {**given, "optim.lr": 0.5}, where)
    assert code == 2 and f"Cannot resume {tmp_path / 'run'}: optim.lr was 0.003, now 0.5. Only log_every, save_every" in said
    assert "may change on resume. To start a new run, give another --workdir; to go on with this one all the same" in said
    assert command(pretrain.main, "pretrain", {**given, "log_every": 5, "save_every": 1}, where)[0] == 0, "what may change"
    assert command(pretrain.main, "pretrain", {**given, "optim.lr": 0.5}, f"--workdir={tmp_path / 'other'}")[0] == 0


def test_8_and_gone_on_with_all_the_same(command, files, tmp_path):
    where, given = f"--workdir={tmp_path / 'run'}", {**TINY, "steps": 1, "data.path": files["text"]}
    other = {**given, "steps": 2, "optim.lr": 0.5}
    assert command(pretrain.main, "pretrain", given, where)[0] == 0
    flag = re.search(r"add (\S+) ", command(pretrain.main, "pretrain", other, where)[1])[1]
    assert flag == "--allow=optim.lr,steps"
    assert command(pretrain.main, "pretrain", other, where, flag)[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in lines if "train/loss" in m] == [1, 2] and (tmp_path / "run" / "result.json").exists()
    changed = "optim.lr was 0.003, now 0.5; steps was 1, now 2"
    assert f"--allow: {changed}" in (tmp_path / "run" / "report.html").read_text()
    before = (tmp_path / "run" / "log.txt").read_text()
    assert command(pretrain.main, "pretrain", other, where, flag)[0] == 0 and (tmp_path / "run" / "log.txt").read_text() == before
    code, said = command(pretrain.main, "pretrain", other, where, "--allow=optim.lrr")
    assert code == 2 and said == "error: --allow=optim.lrr: no such setting. Did you mean --allow=optim.lr?"
    code, said = command(pretrain.main, "pretrain", {**other, "model.d_ff": 96}, where, "--allow=model")
    assert code == 2 and "--allow=model: the checkpoint does not fit these settings" in said
    assert command(pretrain.main, "pretrain", other, where)[0] == 0, "the run is what it was"


def test_8_data_that_changed_gone_on_with_all_the_same(command, files, tmp_path):
    data = Path(shutil.copy(files["text"], tmp_path / "text.jsonl"))
    where, given = f"--workdir={tmp_path / 'run'}", {**TINY, "steps": 1, "data.path": data}
    assert command(pretrain.main, "pretrain", given, where)[0] == 0
    (tmp_path / "run" / "result.json").unlink()  # as if it had been stopped behind its last checkpoint
    data.write_text(data.read_text() + json.dumps({"text": "a line more, of many words " * 9}) + "\n")
    code, said = command(pretrain.main, "pretrain", given, where)
    assert code == 2 and "the data changed since the checkpoint" in said and said.endswith("add --allow=data")
    assert command(pretrain.main, "pretrain", given, where, said.split("add ")[1])[0] == 0


def test_weights_of_another_dtype(command, files, base, tmp_path):
    run = shutil.copytree(base / "sft", tmp_path / "half")
    (step,) = (p for p in (run / "checkpoints").iterdir() if p.name.isdigit())
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), launch.load(run).params)
    shutil.rmtree(step / "params")
    (step / "MANIFEST.json").unlink()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(step / "params", half)
    given = {**SFT, "init": run, "data.path": files["chat"]}
    code, said = command(sft.main, "sft", given, f"--workdir={tmp_path / 'run'}")
    assert code == 2 and "its weights have another dtype" in said and "here float32, there bfloat16" in said
    flag = re.search(r"add (\S+) to the command", said)[1]
    assert command(sft.main, "sft", given, f"--workdir={tmp_path / 'run'}", flag)[0] == 0
    launch.tool(lambda **flags: launch.load(run), "chat", {}, argv=[flag])
    with pytest.raises(SystemExit):
        launch.tool(lambda **flags: launch.load(run), "chat", {}, argv=[])


def test_9_not_enough_memory(command, files, tmp_path, monkeypatch):
    given = {**TINY, "steps": 1, "batch_size": 32, "data.length": 64, "data.path": files["text"]}
    config = parsed(*(f"--config.{name}={value}" for name, value in given.items()))
    model = decoder.make(decoder.DecoderConfig(**{**config.model.to_dict(), "vocab_size": 262}))
    need = sum(memory.needed(config, memory.Step(model)))
    monkeypatch.setattr(fit_memory, "host_room", lambda: 0.7 * need)
    code, said = command(pretrain.main, "pretrain", given, f"--workdir={tmp_path / 'run'}")
    assert code == 2 and re.search(
        r"^error: Not enough memory: this config needs about [\d.]+ GiB on cpu \([\d.]+ GiB\): parameters [\d.]+, optimizer "
        r"[\d.]+, gradients [\d.]+, activations [\d.]+. Any one of these fits: (--config\.\S+ \([\d.]+\)( · )?){3}$",
        said,
    ), said
    fixes = flags_in(said)
    assert len(fixes) == 3 and "accumulate" in fixes
    for name, value in fixes.items():
        fixed = parsed(*(f"--config.{n}={v}" for n, v in (given | {name: value}).items()))
        changed = decoder.make(decoder.DecoderConfig(**{**fixed.model.to_dict(), "vocab_size": 262}))
        memory.check(fixed, memory.Step(changed))
    given["accumulate"] = fixes["accumulate"]
    assert command(pretrain.main, "pretrain", given, f"--workdir={tmp_path / 'run'}")[0] == 0


@pytest.mark.parametrize("stage", ["dpo", pytest.param("grpo", marks=pytest.mark.slow)])
def test_9_not_enough_memory_in_the_stages_behind_pretraining(command, base, files, tmp_path, monkeypatch, stage):
    """By the same function in all of them: `memory.begin`. Each of the settings it names alone is enough."""
    main = importlib.import_module(f"experiments.{stage}").main
    given = {"steps": 1, "batch_size": 8, "init": base / "sft"}
    if stage == "dpo":
        given |= {"data.path": files["pairs"], "data.length": 32}
    else:
        rows = [{"prompt": f"say {w}", "answer": w} for w in "abcdefghijklmnopqrst"]
        given |= {"data.path": write_rows(tmp_path / "rows.jsonl", rows), "rewards": "length:3"}
        given |= {"max_new_tokens": 24, "group": 4}
    asked, real = [], memory.needed

    def ask(config, step):
        asked.append(sum(real(config, step)))
        raise UserError("asked")

    with monkeypatch.context() as patched:
        patched.setattr(memory, "needed", ask)
        assert command(main, stage, given, f"--workdir={tmp_path / 'asked'}") == (2, "error: asked")
    monkeypatch.setattr(memory, "room_of", lambda mesh, held=0.0: 0.9 * asked[0])
    code, said = command(main, stage, given, f"--workdir={tmp_path / 'run'}")
    assert code == 2 and re.search(
        r"^error: Not enough memory: this config needs about \S+ GiB on cpu \(\S+ GiB\): parameters \S+, optimizer \S+, "
        r"gradients \S+, activations \S+ (Any one of these fits|This fits): --config",
        said,
    ), said
    fixes = flags_in(said)
    assert 1 <= len(fixes) <= 3 and not (tmp_path / "run" / "checkpoints").exists()
    name, value = next(iter(fixes.items()))
    assert command(main, stage, given | {name: value}, f"--workdir={tmp_path / 'run'}")[0] == 0, name


def test_9_an_allocation_that_failed(command, tmp_path):
    def main(config, run):
        raise MemoryError

    code, said = command(main, "pretrain", {}, f"--workdir={tmp_path / 'run'}")
    assert code == 2 and said.startswith("error: Not enough memory (MemoryError): try a larger --config.accumulate")
    settings_named = [name for name, _ in settings.settings_of(settings.load_config(settings.config_path("pretrain"))).items()]
    assert all(name in settings_named for name in re.findall(r"--config\.([a-z_.]+)", said))
    full = RuntimeError("RESOURCE_EXHAUSTED: No space left on device")
    assert fit_memory.exhausted(full) is None and fit_memory.exhausted(ValueError("memory")) is None
    assert "Out of memory" in fit_memory.exhausted(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.\nmore"))


def test_11_a_full_disk(command, tmp_path, monkeypatch):
    full = [True]

    def main(config, run):
        if full.pop() if full else False:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "checkpoints/3")
        run.finish({})

    code, said = command(main, "pretrain", {}, f"--workdir={tmp_path / 'run'}")
    assert code == 74 and "No space left on device" in said and "Make room, then continue with:  python -m " in said
    again = said.split("experiments.pretrain ")[1].split()
    assert command(main, "pretrain", {}, *again)[0] == 0 and (tmp_path / "run" / "result.json").exists()


def test_13_a_name_on_the_hub_without_a_network(tmp_path, command, base, files):
    given = {**SFT, "init": base, "data.path": "hf:owner/name"}
    code, said = command(sft.main, "sft", given, f"--workdir={tmp_path / 'run'}")
    assert code == 2
    assert said == "error: hf:owner/name: offline, and not in the cache: pass a local path, of a file or a directory"
    assert command(sft.main, "sft", given | {"data.path": files["chat"]}, f"--workdir={tmp_path / 'run'}")[0] == 0


def test_14_a_run_directory_in_use(command, tmp_path):
    def main(config, run):
        run.finish({})

    (tmp_path / "run").mkdir()
    with runs.lock(tmp_path / "run"):
        code, said = command(main, "pretrain", {}, f"--workdir={tmp_path / 'run'}")
        since = r"since [\d-]{10} [\d:]{8}"
        said = said.removesuffix(": wait, or give another --workdir")
        assert code == 2 and re.search(rf"{tmp_path}/run is in use by process {os.getpid()} on \S+ {since}$", said)
        assert command(main, "pretrain", {}, f"--workdir={tmp_path / 'other'}")[0] == 0
    assert command(main, "pretrain", {}, f"--workdir={tmp_path / 'run'}")[0] == 0, "after waiting"


def test_15_nothing_to_train_on(command, tmp_path, base):
    rows = [{"prompt": "a question of many words " + "and more " * (i % 2 * 2), "completion": "yes"} for i in range(24)]
    given = {**SFT, "init": base, "data.path": write_rows(tmp_path / "chat.jsonl", rows), "data.length": 40}
    code, said = command(sft.main, "sft", given, f"--workdir={tmp_path / 'run'}")
    assert code == 2
    assert re.search(r"chat\.jsonl: 1\d of 2\d examples have no trained token \(the first is '<.user.>a question of", said)
    assert said.endswith("lie beyond config.data.length; raise it or remove those rows")
    assert command(sft.main, "sft", given | {"data.length": 64}, f"--workdir={tmp_path / 'run'}")[0] == 0
    kept = write_rows(tmp_path / "kept.jsonl", rows[::2])
    assert command(sft.main, "sft", given | {"data.path": kept}, f"--workdir={tmp_path / 'kept'}")[0] == 0


def test_debug_shows_where_an_error_arose(tmp_path, capsys):
    for argv, where in (["--config.stps=1"], "settings.py"), (["--config.model.n_heads=7"], "decoder_config.py"):
        with pytest.raises(SystemExit) as stop:
            launch.run(pretrain.main, "pretrain", argv=[*argv, "--debug", f"--workdir={tmp_path / 'run'}"])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and "Traceback" in said and where in said


def test_a_mistake_is_answered_at_once_and_nothing_is_written(tmp_path):
    """Both kinds: one that needs no jax, and one that the model's config finds. CPU seconds, for the machine may be busy."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    for flag, bound in ("--config.modle.d_modl=4", 2.0), ("--config.model.n_heads=7", 6.0):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        argv = [sys.executable, "-m", "experiments.pretrain", flag, f"--workdir={tmp_path / 'run'}"]
        done = subprocess.run(argv, capture_output=True, text=True, env=environ, cwd=tmp_path, timeout=120)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < bound
        assert not (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "run" / "checkpoints").exists()
