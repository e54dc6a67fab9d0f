"""Parity without torch: logits that transformers computed, kept in tests/golden (see scripts/make_golden.py)."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.convert import hf, layout
from jaxllm.core import ops
from jaxllm.models import families
from tests.convert import golden
from tests.models.tiny import fast_jit

FILES = sorted((Path(__file__).resolve().parents[1] / "golden").glob("*.json"))


def test_the_files_are_there_and_small():
    assert len(FILES) >= 24
    assert all(file.stat().st_size < 8000 for file in FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_logits_of_transformers(file, tmp_path):
    record = json.loads(file.read_text())
    family = layout.find_family(record["config"], file)
    ours = family.config(record["config"])
    config = family.adjust(ours, ())
    shapes = layout.expected(family.leaves(config), families.make(config))
    assert golden.digest(shapes) == record["tensors"], "published names or shapes are not those that transformers wrote"
    (tmp_path / "config.json").write_text(json.dumps(record["config"]))
    golden.write(tmp_path, shapes)
    model, params = hf.load(tmp_path)
    tokens = jnp.asarray(golden.TOKENS)
    row = {"tokens": tokens, "segments": jnp.ones_like(tokens)}
    apply = fast_jit(lambda p, x: ops.logits(model.head(p), ops.forward(model, p, x).hidden))
    got = np.asarray(apply(params, {**row, "inputs": row}))
    want = np.array(record["logits"])
    for (row, position), logits in zip(golden.PICKED, want, strict=True):
        assert np.abs(got[row, position] - logits).max() < 1e-4 * record["scale"], f"{record['name']} at {row}, {position}"
