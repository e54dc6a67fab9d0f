"""What each tier closes, as docs/security.md says; which tier is taken; and what a run leaves and sees."""

import os
import subprocess
import sys
import threading
import time

import pytest

from jaxllm.core.types import UserError
from jaxllm.generate.sandbox import probes, runner, tiers

ROOT = os.geteuid() == 0
UNSHARE = {"read files that everybody may read", "write outside its directory"}
RLIMITS = UNSHARE | {"see the training process", "connect to a port of this machine", "send to the internet"}
USERS = {"read a file that only its user may read"}  # who is root gives the program another user
OWN = USERS | {"read the environment of the training process", "send it a signal", "leave a process behind"}
OPEN = {"bwrap": set(), "unshare": UNSHARE | (set() if ROOT else USERS), "rlimits": RLIMITS | (set() if ROOT else OWN)}


def tier(name):
    found = tiers.TIERS[name]
    if why := found.why_not() or runner.works(found):
        pytest.skip(f"{name}: {why}")
    return found


@pytest.mark.parametrize("name", ["bwrap", *(pytest.param(n, marks=pytest.mark.fault) for n in ("unshare", "rlimits"))])
def test_what_a_tier_leaves_open(name):
    found = probes.measure(tier(name), runner.Limits(seconds=3))
    assert {probe for probe, got in found.items() if got} - OPEN[name] == set()
    # the probes can get through: otherwise a typing error in one would read as closed
    assert name != "rlimits" or {probe for probe, got in found.items() if got} >= OPEN[name] - {"send to the internet"}


def test_the_table_has_a_column_for_each_tier():
    text = probes.table({"a": dict.fromkeys(probes.PROBES, False), "b": dict.fromkeys(probes.PROBES, True)})
    assert text.count("| closed | **open** |") == len(probes.PROBES) == 16


# ---- which one


def chosen(name, works, **kwargs):
    return tiers.choose(name, lambda tier: "" if tier.name in works else "no", **kwargs).name


def test_the_best_tier_that_works_is_taken(monkeypatch):
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    monkeypatch.setattr(tiers.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert chosen("auto", ("bwrap", "unshare", "rlimits")) == "bwrap"
    assert chosen("auto", ("unshare", "rlimits")) == "unshare"
    with pytest.raises(UserError, match="shut in here.*bwrap: no; unshare: no.*install bubblewrap, or say unsafe_local"):
        chosen("auto", ("rlimits",))
    with pytest.raises(UserError, match="bwrap: no"):
        chosen("bwrap", ("unshare",))
    monkeypatch.setattr(tiers.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="bwrap is not installed"):
        chosen("auto", ("bwrap",))


def test_limits_alone_are_never_taken_by_themselves():
    with pytest.raises(UserError, match="it can read files, use the network.*say unsafe_local if that is meant"):
        chosen("rlimits", ("rlimits",))
    assert chosen("rlimits", ("rlimits",), unsafe_local=True) == "rlimits"


def test_a_notebook_of_colab_runs_no_code_by_itself(monkeypatch):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    for name in ("auto", "off"):
        with pytest.raises(UserError, match="not run .tier off."):
            chosen(name, ("bwrap",))
    with pytest.raises(UserError, match="'docker': choose one of auto, bwrap, unshare, rlimits, off"):
        chosen("docker", ())


def test_what_a_tier_leaves_open_is_said_in_one_line(capsys):
    tier("rlimits")
    runner.make("rlimits", unsafe_local=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: tier rlimits: model code runs with limits alone")


def test_programs_of_one_moment_have_different_users(monkeypatch):
    monkeypatch.setattr(tiers.os, "geteuid", lambda: 0)
    assert len({tiers.new_uid() for _ in range(2000)}) == 2000
    monkeypatch.setattr(tiers.os, "geteuid", lambda: 1000)
    assert tiers.new_uid() is None


# ---- a run


def test_nothing_stays_of_a_program_however_deep_and_locked_it_is():
    source = "import os\nfor _ in range(2000): os.mkdir('d'); os.chdir('d')\nos.mkdir('e'); os.chmod('.', 0)"
    with runner._home(None) as home:
        subprocess.run([sys.executable, "-c", source], cwd=home, check=True)
    assert not os.path.exists(home)


@pytest.fixture(scope="module")
def made():
    try:
        return runner.make(limits=runner.Limits(seconds=2))
    except UserError as error:
        pytest.skip(str(error))


def test_nothing_of_our_environment_is_inside(made, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    source = "import os, sys\nprint(dict(os.environ), sys.path, os.listdir('.'), sys.argv)"
    outcome = made.program(source, "")
    assert outcome.kind == "ended" and outcome.code == 0, outcome
    assert "hf_" not in outcome.stdout and "site-packages" not in outcome.stdout and "HF_TOKEN" not in outcome.stdout


def test_every_run_is_fresh_and_the_same(made):
    source = (
        "import os\nseen = os.path.exists('mark')\nopen('mark', 'w').close()\ndef f(x): return [seen, list({'a', 'b', 'c', x})]"
    )
    first, again = (made.call(source, "f", ["d"]).values for _ in range(2))
    assert first == again and first[0][0][0] is False


def test_the_standard_library_is_there(made):
    names = "collections, decimal, fractions, heapq, itertools, json.tool, math, random, re, string"
    source = f"import {names}\ndef f(x):\n    return math.gcd(x, 12)"
    assert made.call(source, "f", [18]).values == ((6, ""),)


def test_values_come_back_by_input_and_errors_in_words(made):
    source = "def f(a, b=0):\n    return {'q': (a / b, [None, True, 'ü'])}"
    outcome = made.call(source, "f", [[1, 2], [1, 0], [[3, 4]]])
    assert outcome.values[0] == ({"q": [0.5, [None, True, "ü"]]}, "")
    assert outcome.values[1] == (None, "ZeroDivisionError: division by zero")
    assert outcome.values[2][1].startswith("TypeError")


def test_output_is_cut_and_stdin_given(made):
    outcome = made.program("import sys\nprint(sys.stdin.read()[::-1])\nprint('e', file=sys.stderr)\nsys.exit(3)", "abc")
    assert outcome[:6] == ("ended", (), "cba\n", "e\n", 3, "")
    outcome = made.program("print('x' * 10**6)", "")
    assert outcome.kind == "overflow" and len(outcome.stdout) == 2**16 and "65,536 bytes" in outcome.reason


def test_several_run_at_once(made):
    outcomes = [None] * 4
    source = "import time\ndef f(i):\n    time.sleep(1)\n    return i"

    def one(i):
        outcomes[i] = made.call(source, "f", [i])

    threads = [threading.Thread(target=one, args=(i,)) for i in range(4)]
    begun = time.monotonic()
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [o.values for o in outcomes] == [((i, ""),) for i in range(4)]
    assert time.monotonic() - begun < 3.5


def test_a_machine_that_cannot_start_it_is_no_fault_of_the_program(made, monkeypatch):
    monkeypatch.setattr(tiers, "python", lambda: "/nowhere/python")
    outcome = made.call("def f(x): return x", "f", [1])
    assert outcome.kind == "failure" and "did not begin" in outcome.reason
    monkeypatch.setattr(tiers, "python", lambda: "/bin/true")
    assert made.program("", "").kind == "failure"
