"""Every stage is killed, and ends with the bits of a run that was not: scripts/soak.py, a file for itself beside test_faults."""

import json
import subprocess
import sys

import pytest

from jaxllm.train import faults
from tests.test_faults import ENVIRONMENT, ROOT


@pytest.mark.fault
@pytest.mark.parametrize("stage", ["pretrain", "grpo"])
def test_killed_at_every_point_a_run_ends_with_the_same_bits(stage, tmp_path):
    command = [sys.executable, "scripts/soak.py", "--kills=0", f"--stages={stage}", f"--out={tmp_path / 'out.json'}"]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())["stages"][0]
    expected = set(faults.POINTS) - (set() if stage == "grpo" else set(faults.ONLINE))
    assert set(found["points"]) == expected and found["kills"] >= len(expected) - 1
    assert found["equal"] and len(found["phases"]) >= len(expected) - 1 >= 5 and found["resumed"] >= 5


FURTHER = (
    "reward", "kto", "mlm", "classify", "moe", "t5", "lstm", "imagegpt", "flamingo", "iterative_dpo", "rejection_sampling",
)  # fmt: skip


@pytest.fixture(scope="module")
def further(tmp_path_factory):
    """{stage: what scripts/soak.py found}: killed behind a checkpoint, and again when all was trained and nothing said."""
    out = tmp_path_factory.mktemp("further") / "out.json"
    command = [sys.executable, "scripts/soak.py", "--at=after:manifest,before:result", f"--stages={','.join(FURTHER)}"]
    done = subprocess.run([*command, f"--out={out}"], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert out.exists(), done.stdout + done.stderr
    return {found["stage"]: found for found in json.loads(out.read_text())["stages"]}


@pytest.mark.fault
@pytest.mark.parametrize("stage", FURTHER)
def test_killed_twice_every_other_stage_ends_with_the_same_bits_and_result(stage, further):
    assert further[stage]["equal"] and further[stage]["kills"] == 2 and further[stage]["tries"] >= 3
