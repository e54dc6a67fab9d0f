"""How far two implementations are apart; with JAXLLM_PARITY=FILE every comparison is recorded there for the docs' table."""

import json
import os
from pathlib import Path

import numpy as np


def error(ours, theirs):
    """The largest difference over the largest value of the reference."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-6))


def agree(family, what, ours, theirs, tolerance):
    """Assert that the error is within `tolerance`, and record it as `family`'s error of `what` (logits, gradients)."""
    found = error(ours, theirs)
    record(family, what, found)
    assert found < tolerance, f"{family}: {what} differ by {found:.2e} of their scale, {tolerance:.0e} is allowed"


def record(family, what, value):
    """Keep the largest error of each kind."""
    if not (name := os.environ.get("JAXLLM_PARITY")):
        return
    path = Path(name)
    known = json.loads(path.read_text()) if path.exists() else {}
    entry = known.setdefault(family, {})
    entry[what] = max(entry.get(what, 0.0), float(f"{value:.2g}"))
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
