"""No program that does not add is paid for adding, in any tier; the control, which adds, is."""

import tempfile
import time

import pytest

from jaxllm.core.types import UserError
from jaxllm.generate.rewards import code
from jaxllm.generate.sandbox import runner
from tests.generate.sandbox.hacks import BOMBS, HACKS, HONEST, TESTS, TIMEOUTS

LIMITS = runner.Limits(seconds=1.5)
BOUND = 12.0  # seconds for one program on a busy machine: 1.5 and the start
DEFAULT = "auto"


@pytest.fixture(scope="module")
def made():
    """runner of a tier, made once; skips where the tier cannot be had."""
    have = {}

    def get(tier):
        if tier not in have:
            try:
                have[tier] = runner.make(tier, unsafe_local=True, limits=LIMITS)
            except UserError as error:
                have[tier] = str(error)
        if isinstance(have[tier], str):
            pytest.skip(have[tier])
        return have[tier]

    return get


def tiers(*names):
    """The tier that is chosen by itself, and the named ones left out unless asked for."""
    return pytest.mark.parametrize("tier", [DEFAULT, *(pytest.param(n, marks=pytest.mark.fault) for n in names)])


def judged(made, tier, source):
    begun = time.monotonic()
    verdict = code.judge(made(tier), {"completion": source, "function": "add", "tests": TESTS})
    assert time.monotonic() - begun < BOUND
    return verdict


@tiers("unshare", "rlimits")
def test_a_program_that_adds_is_paid(tier, made):
    assert judged(made, tier, HONEST) == (1.0, "passed", "")
    assert judged(made, tier, f"So:\n```python\nimport os\n```\nor rather\n```python\n{HONEST}\n```\nDone.")[0] == 1.0


@tiers("unshare", "rlimits")
@pytest.mark.parametrize("name", HACKS)
def test_a_hack_is_wrong_and_not_excluded(tier, name, made):
    assert judged(made, tier, HACKS[name])[:2] == (0.0, "wrong")


@tiers("unshare", "rlimits")
@pytest.mark.parametrize("name", TIMEOUTS)
def test_what_never_ends_is_ended_and_counted_apart(tier, name, made):
    assert judged(made, tier, TIMEOUTS[name])[:2] == (0.0, "timeouts")


@tiers("unshare", "rlimits")
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_bounded(tier, name, made, tmp_path, monkeypatch):
    made(tier)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert judged(made, tier, BOMBS[name]).value == 0.0
    assert not list(tmp_path.iterdir())
    assert judged(made, tier, HONEST).value == 1.0  # and the next one finds room


PROGRAM_HACKS = {
    "prints PASS": "print('PASS')",
    "prints what it read": "print(input())",
    "exits with 0": "import sys\nsys.exit(0)",
    "prints and fails": "print(5)\nraise SystemExit(1)",
    "prints all": "for i in range(100): print(i)",
    "nothing": "",
}


@pytest.mark.parametrize("name", PROGRAM_HACKS)
def test_programs_are_paid_for_their_output_alone(name, made):
    tests = [{"input": "2 3\n", "output": "5\n"}, {"input": "4 4\n", "output": "8"}]
    honest = "a, b = map(int, input().split())\nprint(a + b)  # 5"
    assert code.judge(made(DEFAULT), {"completion": honest, "tests": tests}).value == 1.0
    assert code.judge(made(DEFAULT), {"completion": PROGRAM_HACKS[name], "tests": tests}).value == 0.0
