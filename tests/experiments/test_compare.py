"""Runs side by side: what differs, what the seeds allow to conclude, and what they do not."""

import json
import math
import random

import pytest

from experiments.compare import __main__ as compare
from experiments.compare import paired, record, show, verdict
from jaxllm.report import run as runs
from tests.report.test_html import Page

EVIL = '<script>alert("x")</script>'


def make(root, name, *, lr=0.1, seed=0, gain=0.0, experiment="toy", metric="eval/loss", scores=(), data=""):
    """A finished run whose loss falls to 2 less `gain`, with some noise by its seed."""
    rng = random.Random(f"{seed} {lr}")
    run = runs.open_run(root / name, experiment, {"seed": seed, "optim": {"lr": lr}, "note": EVIL if lr != 0.1 else "plain"})
    off = 0.02 * rng.random()
    for step in range(1, 21):
        run.log(step, {"train/loss": 2 - gain + off + 3 / step, metric: 2.1 - gain + off + 3 / step})
    for i, score in enumerate(scores):
        run.sample(20, f"prompt {i}", "text", reward=score)
    if data:
        path = run.path("checkpoints", "20", "data", "metadata")
        path.write_text(json.dumps({"fingerprint": data}))
    run.finish({"note": 1.0, metric: 2.1 - gain + off})
    return str(run.workdir)


def said(capsys, *argv):
    compare.run(list(argv))
    return capsys.readouterr().out


def test_one_run_of_each_says_that_nothing_is_proved(tmp_path, capsys):
    a, b = make(tmp_path, "a", data="f00d"), make(tmp_path, "b", lr=0.2, gain=0.5, data="beef")
    out = said(capsys, a, b)
    assert "optim.lr" in out and "0.1" in out and "0.2" in out
    assert "a difference may be the seed's, and nothing is proved" in " ".join(out.split())
    assert "trained on different rows" in out and "p by Holm" in out
    (line,) = (line for line in out.splitlines() if line.split()[:1] == ["eval/loss"] and "evaluations" not in line)
    assert float(line.split()[-1]) == pytest.approx(-0.5, abs=0.02)
    evals = [t for t in paired.tests_of([record.read(a), record.read(b)]) if t.name == "eval/loss"]
    assert len(evals) == 1 and "20 evaluations" in evals[0].over
    assert math.isnan(evals[0].p) and math.isnan(evals[0].difference.low)  # one run's evaluations have no interval


def test_two_arms_are_tested_over_the_seeds_that_both_have(tmp_path, capsys):
    a = [make(tmp_path, f"a{s}", seed=s) for s in range(4)]
    b = [make(tmp_path, f"b{s}", seed=s, lr=0.2, gain=0.3) for s in range(3)]
    records = [record.read(path) for path in a + b]
    tests = {t.name: t for t in paired.tests_of(records)}
    assert tests["eval/loss"].over == "3 seeds" and tests["eval/loss"].difference.high < 0
    assert tests["eval/loss"].difference.mean == pytest.approx(-0.3, abs=0.02) and tests["eval/loss"].adjusted < 0.05
    out = " ".join(said(capsys, *a, *b).split())
    assert "not explained by the seed in eval/loss" in out and "nothing is proved" not in out


def test_arms_that_are_alike_are_not_told_apart(tmp_path):
    a = [make(tmp_path, f"a{s}", seed=s) for s in range(4)]
    b = [make(tmp_path, f"b{s}", seed=s, lr=0.2, gain=(-1) ** s * 0.05) for s in range(4)]
    records = [record.read(path) for path in a + b]
    tests = paired.tests_of(records)
    assert all(t.difference.low <= 0 <= t.difference.high for t in tests)
    assert "no metric differs by more than seeds do" in verdict.conclusion(records, tests)[0]


def recorded(name, seed, lr, result, steps=20, **more):
    """A Record with values at the end."""
    series = {"train/loss": ([1, steps], [2.0, 1.0])}
    config = {"seed": seed, "optim.lr": lr, **more}
    return record.Record(name, "toy", config, {}, series, result, [], "", True)


def arms(values_a, values_b):
    """Runs of two arms: {metric: a value a seed} each."""
    both = enumerate((values_a, values_b))
    return [recorded(f"{i}{s}", s, 1 + i, {n: v[s] for n, v in values.items()}) for i, values in both for s in range(3)]


def test_of_many_metrics_those_that_differ_by_chance_are_no_finding():
    rng = random.Random(0)
    noise = [{f"eval/m{i}": [rng.gauss(0, 1) for _ in range(3)] for i in range(60)} for _ in range(2)]
    records = arms(*noise)
    tests = paired.tests_of(records)
    alone = [t.name for t in tests if t.p < 0.05]
    assert len(tests) == 60 and 0 < len(alone) < 10 and not any(t.adjusted < 0.05 for t in tests)
    said = " ".join(verdict.conclusion(records, tests))
    assert "no metric differs by more than seeds do" in said and f"Tested alone {len(alone)} more would: {alone[0]}" in said


def test_a_difference_without_spread_is_named_and_not_tested():
    records = arms({"train/lr": [0.1] * 3, "eval/loss": [1.0, 1.1, 1.2]}, {"train/lr": [0.2] * 3, "eval/loss": [1.1, 1.1, 1.3]})
    tests = paired.tests_of(records)
    assert [t.name for t in tests] == ["eval/loss"]
    assert verdict.conclusion(records, tests)[-1] == "Not tested, the difference is the same in every seed: train/lr."


def test_what_does_not_change_the_weights_makes_no_other_arm():
    records = [recorded(f"r{s}", s, 1, {}, save_every=s, log_every=s, watchdog=s) for s in range(3)]
    assert len(paired.arms_of(records)) == 1 and "save_every" not in record.config_differences(records)


def test_a_run_that_diverged_has_no_value_from_before_it_did(tmp_path):
    good = make(tmp_path, "good")
    run = runs.open_run(tmp_path / "bad", "toy", {"seed": 1, "optim": {"lr": 9.0}, "note": "plain"})
    for step in range(1, 41):
        run.log(step, {"train/loss": 1 / step if step < 30 else math.nan, "eval/loss": 1.0, "moe/drops": 1.0})
    run.finish({"eval/loss": math.nan, "note": 1.0})
    records = [record.read(good), record.read(str(run.workdir))]
    assert math.isnan(record.final(records[1], "train/loss")) and math.isnan(record.final(records[1], "eval/loss"))
    said = " ".join(verdict.notes(records))
    assert f"Not finite at the end: eval/loss of {run.workdir}, train/loss of {run.workdir}." in said
    assert "not of one length (20 and 40 steps)" in said and "not all runs have them: moe/drops." in said


def test_a_run_that_is_there_twice_counts_once():
    records = [recorded(name, seed, 1, {}) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert "Counted once, as settings and seed are those of a run before: b." in verdict.notes(records)


def test_repeated_prompts_are_one_pair_and_stages_are_apart():
    samples = [{"step": 1, "prompt": "p", "text": "", "gold": g, "stage": s} for s, g in (("sft", 0), ("sft", 1), ("ppo", 5))]
    found = paired._scored(recorded("a", 0, 1, {})._replace(samples=samples))
    assert found == {"gold of sft": {"p": 0.5}, "gold of ppo": {"p": 5.0}}


def test_seeds_of_one_setting_are_no_comparison(tmp_path):
    records = [record.read(make(tmp_path, f"a{s}", seed=s)) for s in range(3)]
    assert paired.over_seeds(records) == [] and "nothing else" in verdict.conclusion(records, [])[0]


def test_samples_of_the_same_prompts_are_paired(tmp_path):
    a = make(tmp_path, "a", scores=[0.1, 0.2, 0.3, 0.4])
    b = make(tmp_path, "b", lr=0.2, scores=[0.6, 0.8, 0.8, 0.9])
    (test,) = (t for t in paired.tests_of([record.read(a), record.read(b)]) if t.name == "samples: reward")
    assert test.over == "4 prompts" and test.p == 0.125
    assert test.difference.mean == pytest.approx(0.525) and test.difference.low > 0
    assert any("these prompts" in line for line in verdict.conclusion([record.read(a), record.read(b)], [test]))


def test_the_page_has_a_curve_for_each_shared_metric_and_escapes_all(tmp_path, capsys):
    a, b = make(tmp_path, "a"), make(tmp_path, "b", lr=0.2)
    out = tmp_path / "compare.html"
    said(capsys, a, b, f"--out={out}")
    page = Page(out.read_text())
    assert not page.unclosed and not {"script", "link", "img"} & set(page.tags) and "alert" in page.text
    assert page.tags.count("svg") == 2  # train/loss and eval/loss
    said(capsys, a, b, f"--out={out}")  # its own page may be made anew


def test_lines_fit_a_terminal(tmp_path):
    records = [record.read(make(tmp_path, f"{'long' * 9}{i}", lr=0.1 * i)) for i in range(1, 5)]
    assert all(len(line) <= 80 for line in show.text(records, paired.tests_of(records), 80))


def test_runs_of_other_experiments_are_compared_and_said_to_be(tmp_path, capsys):
    out = said(capsys, make(tmp_path, "a"), make(tmp_path, "b", experiment="other"))
    assert "different experiments (toy, other)" in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "give two runs or more"), (["a"], "give two runs or more"), (["a", "a"], "each once"),
        (["a", "nowhere"], "nowhere: no run directory"), (["a", "empty"], "empty: the run has no metrics"),
        (["a", "other"], "no metric in common"), (["a", "b", "--outt=x"], "Did you mean --out=x"),
        (["a", "b", "--out=a/config.json"], "is no page of experiments.compare"),
        (["a", "b", "--out=nowhere/x.html"], "no directory"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(argv, words, tmp_path, monkeypatch, capsys):
    make(tmp_path, "a"), make(tmp_path, "b", lr=0.2)
    runs.open_run(tmp_path / "empty", "toy", {})
    strange = runs.open_run(tmp_path / "other", "toy", {})
    strange.log(1, {"moe/drops": 0.0})
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        compare.run(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1


def test_a_directory_of_stages_names_them(tmp_path):
    make(tmp_path, "whole/sft")
    runs.open_run(tmp_path / "whole", "quickstart", {})
    with pytest.raises(Exception, match=r"give one of its stages: .*whole/sft"):
        record.read(str(tmp_path / "whole"))
