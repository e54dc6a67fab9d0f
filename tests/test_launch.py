"""The command line: golden messages, exit codes, resuming, and the same inside a process."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxllm import launch, settings
from jaxllm.core.types import UserError
from jaxllm.report import run as runs

CONFIG = """
from ml_collections import ConfigDict, config_dict

def get_config(variant=None):
    c = ConfigDict()
    c.steps = 10  # how long
    c.log_every = 1
    c.over_optimise = False
    c.name = "x"
    c.init = config_dict.placeholder(str)
    c.anything = None
    c.optim = ConfigDict(dict(lr=1e-3, warmup=0, betas=(0.9, 0.95)))
    c.model = ConfigDict(dict(d_model=128, n_heads=4))
    if variant == "big":
        c.model.d_model = 512
    elif variant:
        raise ValueError(f"no variant {variant!r}; there is: big")
    return c
"""


@pytest.fixture(autouse=True)
def toy(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "toy.py").write_text(CONFIG)
    monkeypatch.setattr(settings, "CONFIGS", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "JAX_COORD", "JAX_NUM", "JAX_PROCESS", "JAXLLM_PROCESSES", "TPU_WORKER")):
            monkeypatch.delenv(name)
    return tmp_path


def refusal(*argv, **extra):
    with pytest.raises(ValueError) as error:
        settings.parse(list(argv), "toy", extra)
    return str(error.value)


def parsed(*argv, **extra):
    return settings.parse(list(argv), "toy", extra)


def trained(calls):
    """A main that records its calls and finishes."""

    def main(config, run, **flags):
        calls.append((config, flags))
        run.log(1, {"train/loss": 1.0})
        run.finish({"steps": config.steps})

    return main


# ---- the command line


GOLDEN = [
    (
        "--config.optim.lrr=1",
        "Unknown setting --config.optim.lrr=1. Did you mean --config.optim.lr? "
        "(try --config.optim.lr=1). See all: --help-config optim",
    ),
    (
        "--config.modle.d_modl=4",
        "Unknown setting --config.modle.d_modl=4. Did you mean --config.model.d_model? "
        "(try --config.model.d_model=4). See all: --help-config model",
    ),
    (
        "--config.lr=3",
        "Unknown setting --config.lr=3. Did you mean --config.optim.lr? "
        "(try --config.optim.lr=3). See all: --help-config optim",
    ),
    ("--config.zzzzqq=3", "Unknown setting --config.zzzzqq=3. See all: --help-config"),
    (
        "--config.optim=3",
        "--config.optim is a group of settings: "
        "--config.optim.betas, --config.optim.lr, --config.optim.warmup",
    ),
    ("steps=3", '"steps=3" is not a flag and would have been ignored. Did you mean --config.steps=3 ?'),
    ("lr=3", '"lr=3" is not a flag and would have been ignored. Did you mean --config.optim.lr=3 ?'),
    ("now", '"now" is not a flag and would have been ignored.'),
    ("--steps=3", "Unknown flag --steps=3. Did you mean --config.steps=3 ?"),
    ("--wrkdir=x", "Unknown flag --wrkdir=x. Did you mean --workdir=x ?"),
    (
        "--config.steps=many",
        "--config.steps=many: expected a whole number (100, 1e3, 2k, 3M); it is 10 by default",
    ),
    (
        "--config.steps=0.5",
        "--config.steps=0.5: expected a whole number (100, 1e3, 2k, 3M); it is 10 by default",
    ),
    ("--config.optim.lr=fast", "--config.optim.lr=fast: expected a number; it is 0.001 by default"),
    ("--config.optim.lr=nan", "--config.optim.lr=nan: expected a number; it is 0.001 by default"),
    (
        "--config.over_optimise=maybe",
        "--config.over_optimise=maybe: expected true or false; it is False by default",
    ),
    ("--config.steps", "--config.steps: expected a value; it is 10 by default"),
    (
        "--config.optim.betas=" + "-" * 10**5 + "1",
        "--config.optim.betas=" + "-" * 10**5 + "1: expected a tuple like (1, 2); it is (0.9, 0.95) by default",
    ),
    ("--n=x", "--n=x: expected a whole number (100, 1e3, 2k, 3M)"),
    ("--workdir", "--workdir: expected a value"),
]


@pytest.mark.parametrize(("argument", "message"), GOLDEN, ids=[argument[:60] for argument, _ in GOLDEN])
def test_golden_refusals(argument, message):
    assert refusal(argument, n=3) == message


def test_all_mistakes_are_listed_at_once():
    lines = refusal("--config.optim.lrr=1", "steps=3", "--wrkdir=x", "--config.steps=a").split("\n")
    assert len(lines) == 4


@pytest.mark.parametrize("argument", [argument for argument, _ in GOLDEN if "(try" in _ or "?" in _])
def test_the_suggested_fix_works(argument):
    message = refusal(argument)
    before, after = ("(try ", ")") if "(try" in message else ("Did you mean ", " ?")
    parsed(message.split(before)[1].split(after)[0])


def test_unknown_config_files_and_variants_are_named(toy):
    assert refusal("--config=configs/toi.py") == "No config file configs/toi.py. Did you mean configs/toy.py?"
    assert "no variant 'huge'; there is: big" in refusal("--config=configs/toy.py:huge")
    (toy / "configs" / "bad.py").write_text("def get_config(:")
    assert "bad.py does not load: SyntaxError" in refusal("--config=configs/bad.py")


def test_values_of_every_type():
    config = parsed(
        "--config.steps=1_000", "--config.optim.lr", "3e-5", "--config.optim.warmup=2k",
        "--config.over_optimise", "--config.optim.betas=0.8,0.99", "--config.name=a=b c",
        "--config.init=runs/x@400", "--config.anything=7",
    ).config  # fmt: skip
    assert (config.steps, config.optim.lr, config.optim.warmup) == (1000, 3e-5, 2000)
    assert (config.over_optimise, config.optim.betas, config.name) == (True, (0.8, 0.99), "a=b c")
    assert (config.init, config.anything) == ("runs/x@400", 7)
    assert config.is_locked and config.model.is_locked


def test_variant_and_overrides_and_bool_spellings():
    argv = ("--config=configs/toy.py:big", "--config.model.n_heads=8", "--noconfig.over_optimise")
    config = parsed(*argv).config
    assert (config.model.d_model, config.model.n_heads, config.over_optimise) == (512, 8, False)
    assert parsed("--config.over_optimise", "--config.steps=2").config.steps == 2
    assert parsed("--config.over_optimise=yes").config.over_optimise is True


def test_the_last_of_two_overrides_counts():
    assert parsed("--config.steps=1", "--config.steps=2").config.steps == 2
    assert parsed("--noconfig.over_optimise", "--config.over_optimise=true").config.over_optimise is True
    assert parsed("--config.over_optimise=true", "--noconfig.over_optimise").config.over_optimise is False


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e3", 1000), ("2k", 2000), ("3M", 3_000_000), ("1_000", 1000), ("1.5k", 1500), ("-3", -3), ("+4", 4)]
    + [(text, None) for text in ("", "k", "1.5", "1e-3", "0x10", "1e999999999", "three", "1__e")],
)
def test_whole_numbers(text, number):
    assert settings.whole_number(text) == number


def test_own_flags_reach_main_with_their_types():
    assert parsed("--stage=ppo", "--n=2k", "--fast", stage=None, n=3, fast=False).extra == {
        "stage": "ppo",
        "n": 2000,
        "fast": True,
    }
    assert parsed(stage=None, n=3).extra == {"stage": None, "n": 3}


def test_command_can_be_repeated():
    command = parsed("--config.name=a b", "--config.steps=3")
    repeated = "python -m experiments.toy '--config.name=a b' --config.steps=3 --workdir=runs/"
    assert command.text.startswith(repeated)
    assert str(command.workdir) in command.text


def test_help_lists_settings_with_comments(capsys):
    launch.run(trained([]), "toy", argv=["--help-config"])
    assert "--config.steps=10                                 # how long" in capsys.readouterr().out
    launch.run(trained([]), "toy", argv=["--help-config", "optim"])
    shown = capsys.readouterr().out
    assert "--config.optim.lr=0.001" in shown and "steps" not in shown


    launch.run(trained([]), "toy", argv=["--help-config=model", "--config=configs/toy.py:big"])
    shown = capsys.readouterr().out
    assert "--config.model.d_model=512" in shown and "lr" not in shown
    with pytest.raises(SystemExit) as stop:
        launch.run(trained([]), "toy", argv=["--help-config", "modle"])
    assert stop.value.code == 2 and "No setting begins with 'modle'. Did you mean --help-config model" in capsys.readouterr().err


# ---- runs


def exit_code(main, *argv):
    try:
        launch.run(main, "toy", argv=list(argv))
    except SystemExit as stop:
        return stop.code
    return 0


def test_run_then_finished_then_other_settings(toy, capsys):
    calls = []
    assert exit_code(trained(calls), "--workdir=w", "--config.steps=3") == 0
    assert exit_code(trained(calls), "--workdir=w", "--config.steps=3") == 0
    assert len(calls) == 1
    out = capsys.readouterr().out
    assert "w is finished: nothing to do. Report: w/report.html" in out
    before = {p: p.read_bytes() for p in Path("w").glob("*.*")}
    assert exit_code(trained(calls), "--workdir=w", "--config.steps=4") == 2
    assert "error: Cannot resume w: steps was 3, now 4." in capsys.readouterr().err
    assert {p: p.read_bytes() for p in Path("w").glob("*.*")} == before and len(calls) == 1


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("data.jsonl:3: no such column"), 2, "error: data.jsonl:3: no such column\n"),
        (KeyboardInterrupt(), 130, "Continue with:  python -m experiments.toy --workdir=w"),
        (OSError(28, "No space left on device"), 74, "error: the disk failed"),
        (RuntimeError("RESOURCE_EXHAUSTED: No space left on device"), 74, "error: the disk failed"),
        (ZeroDivisionError("oh"), 70, "bug (ZeroDivisionError: oh). Traceback: w/crash/traceback.txt"),
        (SystemExit(75), 75, "Stopped. Continue with:"),
    ],
)
def test_exit_codes(error, code, words, capsys):
    def main(config, run):
        raise error

    assert exit_code(main, "--workdir=w") == code
    shown = capsys.readouterr().err
    assert words in shown
    assert ("Traceback (most" in shown) == (code == 70)
    assert Path("w/crash/traceback.txt").exists() == (code == 70)


def test_debug_shows_the_traceback_of_a_user_error(capsys):
    def main(config, run):
        raise UserError("wrong")

    assert exit_code(main, "--workdir=w", "--debug") == 2
    assert "Traceback (most" in capsys.readouterr().err


def test_a_chosen_setting_is_in_the_config_of_the_resumed_run():
    seen = []

    def main(config, run):
        seen.append(config.optim.warmup)
        run.choose(lambda: {"optim.warmup": 77})
        raise KeyboardInterrupt

    assert exit_code(main, "--workdir=w") == exit_code(main, "--workdir=w") == 130
    assert seen == [0, 77]


def test_a_tool_makes_no_run(toy, capsys):
    given = {}
    flags = {"run": "", "temp": 1.0}
    launch.tool(lambda **flags: given.update(flags), "chat", flags, argv=["--run=x", "--temp=0.5"])
    assert given == {"run": "x", "temp": 0.5} and not (toy / "runs").exists()
    with pytest.raises(SystemExit) as stop:
        launch.tool(lambda **flags: None, "chat", {"run": ""}, argv=["--rum=x"])
    assert stop.value.code == 2 and "Unknown flag --rum=x. Did you mean --run=x ?" in capsys.readouterr().err


def test_start_runs_once_and_gives_the_result(toy):
    calls = []
    result = launch.start(trained(calls), "toy", {"steps": 7, "optim.lr": 1, "init": toy / "x"}, "w")
    assert (
        result["metrics"]
        == {"steps": 7}
        == launch.start(trained(calls), "toy", {"steps": 7, "optim.lr": 1, "init": toy / "x"}, "w")["metrics"]
    )
    ((config, _),) = calls
    assert config.optim.lr == 1.0 and config.init == str(toy / "x") and config.is_locked
    assert "--config.steps=7" in json.loads(Path("w/env.json").read_text())["command"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optim.lrr": 1}, r"Unknown setting optim.lrr=1. Did you mean optim.lr\?"),
        ({"steps": "many"}, "steps=many: expected a whole number"),
        ({"steps": 2.5}, "steps=2.5: expected a whole number"),
        ({"steps": True}, "steps=True: expected a whole number"),
        ({"name": 3}, "name=3: expected text"),
    ],
)
def test_start_refuses_like_the_command_line(overrides, message):
    with pytest.raises(UserError, match=message):
        launch.start(trained([]), "toy", overrides, "w")
    assert not Path("w").exists()


def test_start_without_a_finish_gives_nothing():
    assert launch.start(lambda config, run: None, "toy", {}, "w") == {}
    assert runs.finished("w") is None


def test_where_a_run_is(toy, monkeypatch):
    for name in ("me@host/run", "a@b"):
        Path(name, "checkpoints", "3", "meta").mkdir(parents=True)
    assert launch.find_stage("me@host/run") == (Path("me@host/run"), None) and launch.find_stage("a@b") == (Path("a@b"), None)
    assert launch.find_stage("me@host/run@40") == (Path("me@host/run"), 40)
    monkeypatch.setenv("HOME", str(toy / "me@host"))
    assert launch.find_stage("~/run@40") == (toy / "me@host/run", 40) and parsed("--workdir=~/new").workdir == toy / "me@host/new"
    with pytest.raises(UserError, match="^me@host/rum: no such run directory; did you mean me@host/run?"):
        launch.find_stage("me@host/rum")
    with pytest.raises(UserError, match="the step after @ must be a number, for example a@b@400"):
        launch.find_stage("a@b@last")
    Path("a@b/checkpoints/3/meta/metadata").write_text("{")  # damaged: loading it says so
    assert launch.find_stage("a@b", "sft") == (Path("a@b"), None)


# ---- processes and caches


def test_several_processes_need_a_named_workdir(monkeypatch, capsys):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert exit_code(trained([])) == 2
    assert "name it with --workdir=DIR" in capsys.readouterr().err


def test_compile_cache(tmp_path, monkeypatch):
    given = launch.compile_cache({"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "c")})
    assert given["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "c") and (tmp_path / "c").is_dir()
    assert given["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "0"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert launch.compile_cache({})["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "home/.cache/jaxllm/xla")
    (tmp_path / "file").write_text("")
    assert launch.compile_cache({"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "file" / "c")}) == {}


SCRIPT = """
import sys
from pathlib import Path
from jaxllm import launch, settings
settings.CONFIGS = Path("configs")

def main(config, run):
    run.finish({})

def tool(**flags):
    print("a line of a tool")

if __name__ == "__main__":
    if "--tool" in sys.argv:
        launch.tool(tool, "toy", {"tool": False})
    else:
        launch.run(main, "toy")
"""


def test_output_that_nobody_reads_any_more(toy):
    """`| head` may be gone before the last line: help and tools then end quietly, a run goes on and keeps its own code."""
    (toy / "toy_experiment.py").write_text(SCRIPT)
    environ = {**os.environ, "PYTHONPATH": str(Path(launch.__file__).parents[1]), "XLA_FLAGS": ""}
    for argv, code in (["--help-config"], 141), (["--help"], 141), (["--tool"], 141), (["--workdir=w"], 0):
        reader, writer = os.pipe()
        os.close(reader)
        argv = [sys.executable, "toy_experiment.py", *argv]
        done = subprocess.run(argv, stdout=writer, stderr=subprocess.PIPE, text=True, env=environ, timeout=60)
        os.close(writer)
        assert (done.returncode, done.stderr) == (code, ""), argv
    assert (toy / "w" / "result.json").exists()


def test_exit_codes_of_a_real_process(toy):
    (toy / "toy_experiment.py").write_text(SCRIPT)
    environ = {**os.environ, "PYTHONPATH": str(Path(launch.__file__).parents[1]), "XLA_FLAGS": ""}

    def command(*argv):
        argv = [sys.executable, "toy_experiment.py", *argv]
        return subprocess.run(argv, capture_output=True, text=True, env=environ, timeout=60)

    began = time.monotonic()
    wrong = command("--config.stps=3")
    assert time.monotonic() - began < 10  # 1 s here; the bound leaves room for a busy machine
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr.startswith("error: Unknown setting --config.stps=3. Did you mean --config.steps?")
    assert "Traceback" not in wrong.stderr and not (toy / "runs").exists()
    right = command("--workdir=w")
    assert right.returncode == 0 and (toy / "w" / "result.json").exists()
