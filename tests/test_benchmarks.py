"""The benchmarks: arithmetic of rows, the table, what is asked for, and that the contenders do the same work."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import __main__ as driver
from benchmarks import ceilings, rows
from benchmarks import shape as given
from benchmarks.shape import Shape

TINY = Shape(layers=2, width=16, heads=2, vocab=128, length=16, batch=2, steps=1)  # 128: nothing pads the vocabulary


def parsed(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
    return driver.parse()


# ---- rows and table


def test_ratios_are_throughputs_or_costs_within_a_round():
    faster = rows.row("train_step/torch_eager", [1.0, 2.0, 4.0], [2.0, 2.0, 2.0])
    assert (faster["low"], faster["ratio"], faster["high"]) == (0.75, 1.0, 1.5)  # quartiles of 2, 1, 0.5
    dearer = rows.row("moe_step/dense", [3.0, 3.0, 3.0], [2.0, 2.0, 2.0])
    assert dearer["ratio"] == 1.5 and dearer["better"] == "less" and not rows.holds(dearer)
    assert rows.of_values("x", [0.2], 0.25, "less") == {
        "name": "x", "ratio": 0.2, "low": 0.2, "high": 0.2, "must": 0.25, "better": "less",
    }  # fmt: skip


def test_what_was_not_measured_is_null():
    empty = rows.row("generate/transformers", [1.0], [])
    assert empty["ratio"] is empty["low"] is empty["high"] is None and empty["must"] == 2.0
    assert "not measured" in rows.table([empty])


@pytest.mark.parametrize(
    "ratio,must,better,verdict",
    [(1.0, 0.97, "more", "holds"), (0.9, 0.97, "more", "FAILS"), (1.2, 1.25, "less", "holds"), (1.3, 1.25, "less", "FAILS"),
     (0.1, None, "more", "reported")],
)  # fmt: skip
def test_table_says_what_holds(ratio, must, better, verdict):
    line = rows.table([rows.of_values("a/b", [ratio] * 3, must, better)]).splitlines()[1]
    assert line.startswith("a/b ") and line.endswith(verdict) and f"{ratio:.3f}-{ratio:.3f}" in line


def test_bound_against_torch_depends_on_the_version_of_jax():
    assert [rows.torch_must(v) for v in ("0.10.2", "0.11.0", "0.12.0.1", "1.0.0")] == [0.75, 0.75, 0.80, 0.80]


# ---- the command line


def test_unknown_name_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(monkeypatch, "--out=x.json", "train_step/nobody")
    assert stop.value.code == 2 and "train_step/nobody" in capsys.readouterr().err


def test_every_target_exists_and_every_row_is_named_once():
    assert len(set(rows.NAMES)) == len(rows.NAMES)
    assert {name.partition("/")[0] for name in rows.RIVALS} == set(rows.OURS)
    entries = [(t, ()) for t in rows.OURS.values()] + [
        (r.target, r.needs) for r in (*rows.RIVALS.values(), *rows.PROBES.values())
    ]
    for target, needs in entries:
        module, function = target.split(":")
        source = Path(importlib.util.find_spec(module).origin).read_text()
        assert f"def {function}(" in source, target
        assert all(isinstance(package, str) for package in needs)


def test_json_has_the_rows_asked_for(monkeypatch, tmp_path, capsys):
    """Without processes: what the children would answer is made up."""
    seconds = {"loss_memory/naive": [0.1, 0.1], "loss_step/naive": [0.9, 1.1, 1.0]}
    monkeypatch.setattr(driver, "ask", lambda target, shape, rounds: seconds)
    parsed(monkeypatch, f"--out={tmp_path / 'rows.json'}", "loss_step/naive", "h200/decode_1")
    driver.main()
    found = json.loads((tmp_path / "rows.json").read_text())
    assert [r["name"] for r in found] == ["loss_step/naive", "h200/decode_1"]
    assert all(set(r) == {"name", "ratio", "low", "high", "must", "better"} for r in found)
    assert found[0]["ratio"] == 1.0 and found[1]["ratio"] is None
    assert "holds" in capsys.readouterr().out


def test_unequal_work_is_refused():
    ours = {"parameters": 10, "losses": [1.0, 0.9], "flops": 100.0}
    driver.check("x", ours, {"parameters": 10, "losses": [1.0, 0.9005]})
    for theirs in ({"parameters": 11, "losses": [1.0, 0.9]}, {"parameters": 10, "losses": [1.0, 0.902]}, {"flops": 102.0}):
        with pytest.raises(AssertionError):
            driver.check("x", ours, theirs)


# ---- the contenders


def losses_of(module, monkeypatch):
    monkeypatch.setattr(given, "CHECKED_STEPS", 3)
    facts, run = importlib.import_module(f"benchmarks.{module}").train_step(TINY)
    run(1)
    return facts


def test_contenders_have_the_same_parameters_losses_and_flops(monkeypatch):
    ours = losses_of("ours", monkeypatch)
    assert ours["parameters"] == given.count(given.weights(TINY))
    assert ours["losses"][2] < ours["losses"][0]
    for module in ("hand_written", "flax_linen", "flax_nnx"):
        with jax.numpy_rank_promotion("allow"):  # theirs are written as their libraries are
            theirs = losses_of(module, monkeypatch)
        assert theirs["parameters"] == ours["parameters"], module
        np.testing.assert_allclose(theirs["losses"], ours["losses"], atol=1e-5, err_msg=module)
    np.testing.assert_allclose(ceilings.flops(TINY), ours["flops"], rtol=1e-6)


def test_products_are_those_of_the_gradients_too():
    for (b, m, k, n), times in ceilings.products(TINY):
        mine = [q for q, count in ceilings.triples(TINY) if sorted(q) == sorted((b, m, k, n)) and count == times]
        assert {(b, m, k, n), (b, m, n, k), (b, k, m, n)} <= set(mine)
    facts, run = ceilings.train_step(TINY)
    assert facts["flops"] == sum(2 * times * b * m * k * n for (b, m, k, n), times in ceilings.triples(TINY))
    run(1)


def test_loss_needs_a_fraction_of_the_memory_and_is_the_same():
    from benchmarks import memory

    arguments = memory.arguments_of(512, 8, 4 * 8192)
    ours, theirs = (memory.compiled(fn, arguments) for fn in (memory.chunked, memory.naive))
    assert ours.memory_analysis().temp_size_in_bytes < 0.7 * theirs.memory_analysis().temp_size_in_bytes
    np.testing.assert_allclose(float(ours(*arguments)[0]), float(theirs(*arguments)[0]), rtol=1e-5)


def test_gpu_rows_are_measured_by_functions_that_run_anywhere():
    from benchmarks import gpu
    from jaxllm.models.presets import preset

    config = preset("gpt2", vocab_size=128, max_length=32, n_layers=2, n_heads=2, d_model=16, d_ff=32)
    assert gpu.train(TINY, 1) == gpu.decoding(TINY, 1) == {}  # no H200 here
    assert all(rate > 0 for rate in gpu.flops_rates(config, 2, 16, rounds=2, steps=1))
    assert len(gpu.byte_rates(config, 2, prompt=4, new_tokens=6, rounds=2)) == 2
    assert set(gpu.TRAINED) | set(gpu.DECODED) == {n for p in ("h200_train", "h200_decode") for n in rows.PROBES[p].rows}


def test_settings_of_the_command_line_are_the_shape(monkeypatch):
    args = parsed(monkeypatch, "--out=x.json", "--new-tokens=3", "--layers=1")
    assert (args.new_tokens, args.layers) == (3, 1)
    assert all(getattr(args, field.name) == field.default for field in dataclasses.fields(Shape)[1:3])
