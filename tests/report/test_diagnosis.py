"""Each rule speaks of the curve that has its problem, and is silent on the same run in health."""

import json
import math
import random

import pytest

from jaxllm.report import diagnosis, html, metrics, rules
from jaxllm.report import run as runs

N = 60
STEPS = list(range(1, N + 1))


def curve(f, noise=0.0, seed=0):
    rng = random.Random(seed)
    return STEPS, [f(i / (N - 1)) + noise * rng.gauss(0, 1) for i in range(N)]


def falling(high, low, noise=0.02, seed=0):
    return curve(lambda x: low + (high - low) * math.exp(-4 * x), noise, seed)


TIMES = {"time/data": curve(lambda x: 0.05), "time/step": curve(lambda x: 1.0), "train/lr": curve(lambda x: 1e-3 * (1 - 0.9 * x))}
EVALS = ([20, 40, 60], [2.6, 2.2, 2.05])
HEALTHY = {
    "lm": {
        **TIMES, "train/loss": falling(5, 2), "train/grad_norm": curve(lambda x: 1.0, 0.1), "eval/loss": EVALS,
        "train/mean_token_accuracy": curve(lambda x: 0.1 + 0.4 * x, 0.01), "moe/load_min": curve(lambda x: 0.7, 0.02),
        "guard/skipped": curve(lambda x: 0.0),
    },
    "dpo": {
        **TIMES, "train/loss": falling(0.75, 0.4), "train/grad_norm": curve(lambda x: 2.0, 0.2),
        "rewards/chosen": curve(lambda x: 0.4 * x), "rewards/rejected": curve(lambda x: -1.5 * x),
        "rewards/margins": curve(lambda x: 1.9 * x), "rewards/accuracies": curve(lambda x: 0.5 + 0.35 * min(1, 2 * x), 0.02),
        "logps/chosen": curve(lambda x: -20 - x), "logps/rejected": curve(lambda x: -21 - 8 * x),
        "pairs/identical": curve(lambda x: 0),
    },
    "reward": {
        **TIMES, "train/loss": falling(0.69, 0.35), "train/accuracy": curve(lambda x: 0.5 + 0.3 * x, 0.02),
        "train/margin": curve(lambda x: 2 * x),
    },
    "grpo": {
        **TIMES, "train/loss": curve(lambda x: 0.1, 0.02), "train/grad_norm": curve(lambda x: 0.5, 0.05),
        "train/reward": curve(lambda x: 0.2 + 0.5 * x, 0.03), "train/entropy": falling(1.0, 0.5),
        "train/frac_reward_zero_std": curve(lambda x: 0.3, 0.05), "train/kl": curve(lambda x: 0.05 * x),
        "objective/kl": curve(lambda x: 3 * x), "completions/mean_length": curve(lambda x: 20 + 4 * x, 1),
        "completions/clipped_ratio": curve(lambda x: 0.05), "clip_ratio/region_mean": curve(lambda x: 0.02),
        "rewards/readable/mean": curve(lambda x: 0.9), "rewards/numeric/mean": curve(lambda x: 0.5),
        "rewards/excluded": curve(lambda x: 0),
        "first/policy/approxkl_avg": curve(lambda x: 1e-9), "first/val/ratio": curve(lambda x: 1.0),
        "sampling/importance_sampling_ratio/mean": curve(lambda x: 1.0),
    },
    "ppo": {
        **TIMES, "objective/scores": curve(lambda x: 1.5 * x, 0.05), "objective/kl": curve(lambda x: 8 * x),
        "policy/entropy_avg": falling(1.2, 0.8), "policy/clipfrac_avg": curve(lambda x: 0.1),
        "val/num_eos_tokens": curve(lambda x: 0.95),
        "loss/value_avg": falling(0.5, 0.2), "completions/mean_length": curve(lambda x: 20, 1),
        "policy/approxkl_avg": curve(lambda x: 0.01),
    },
}  # fmt: skip


def spiked(line, at, value):
    return line[0], [value if i == at else v for i, v in enumerate(line[1])]


# verdict's name -> (the run that is healthy without it, the lines that are ill, the step at which it should begin or None)
ILL = {
    "not finite": ("lm", {"train/loss": spiked(falling(5, 2), 30, math.nan)}, 31),
    "learning rate 0": ("lm", {"train/lr": curve(lambda x: 0.0)}, 1),
    "loss flat": ("lm", {"train/loss": curve(lambda x: 4.0, 0.005)}, 1),
    "loss diverging": ("lm", {"train/loss": curve(lambda x: 5 - 6 * x if x < 0.4 else 2.6 + 5 * (x - 0.4), 0.02)}, 25),
    "loss spike": ("lm", {"train/loss": spiked(falling(5, 2), 40, 9.0)}, 41),
    "gradient spike": ("lm", {"train/grad_norm": spiked(curve(lambda x: 1.0, 0.1), 40, 50.0)}, 41),
    "loss near 0": ("lm", {"train/mean_token_accuracy": curve(lambda x: min(1.0, 0.2 + 3 * x))}, None),
    "overfitting": ("lm", {"eval/loss": ([20, 40, 60], [2.6, 2.3, 2.9])}, 40),
    "eval gap": ("lm", {"train/loss": falling(5, 1), "eval/loss": ([60], [3.5])}, 60),
    "data wait": ("lm", {"time/data": curve(lambda x: 2.0)}, 1),
    "dead expert": ("lm", {"moe/load_min": curve(lambda x: max(0.0, 0.7 - 2 * x))}, None),
    "guard/skipped": ("lm", {"guard/skipped": curve(lambda x: 0.2 * x)}, None),
    "start off the reference": ("dpo", {"rewards/chosen": curve(lambda x: 0.8 + x)}, 1),
    "accuracy stuck": ("dpo", {"rewards/accuracies": curve(lambda x: 0.5, 0.01)}, 1),
    "chosen falls": ("dpo", {"logps/chosen": curve(lambda x: -20 - 30 * x),
                             "logps/rejected": curve(lambda x: -21 - 60 * x)}, None),
    "pairs/identical": ("dpo", {"pairs/identical": curve(lambda x: 0.4)}, 1),
    "entropy collapse": ("grpo", {"train/entropy": curve(lambda x: 1.0 if x < 0.6 else 0.02)}, 37),
    "train/kl": ("grpo", {"train/kl": curve(lambda x: 4 * x)}, None),
    "objective/kl": ("ppo", {"objective/kl": curve(lambda x: 200 * x)}, None),
    "reward flat": ("grpo", {"train/reward": curve(lambda x: 0.3, 0.02)}, 1),
    "length": ("grpo", {"completions/mean_length": curve(lambda x: 20 + 100 * x)}, None),
    "train/frac_reward_zero_std": ("grpo", {"train/frac_reward_zero_std": curve(lambda x: 0.95)}, 1),
    "completions/clipped_ratio": ("grpo", {"completions/clipped_ratio": curve(lambda x: 0.9)}, 1),
    "clip_ratio/region_mean": ("grpo", {"clip_ratio/region_mean": curve(lambda x: 0.5)}, 1),
    "rewards/readable/mean": ("grpo", {"rewards/readable/mean": curve(lambda x: 0.1)}, 1),
    "rewards/excluded": ("grpo", {"rewards/excluded": spiked(curve(lambda x: 0), 8, 3.0)}, 9),
    "sampler mismatch": ("grpo", {"first/policy/approxkl_avg": curve(lambda x: 0.2)}, 1),
    "sampling/importance_sampling_ratio/mean": ("grpo", {"sampling/importance_sampling_ratio/mean": curve(lambda x: 0.7)}, 1),
    "policy/clipfrac_avg": ("ppo", {"policy/clipfrac_avg": curve(lambda x: 0.6)}, 1),
    "val/num_eos_tokens": ("ppo", {"val/num_eos_tokens": curve(lambda x: 0.2)}, 1),
    "value diverging": ("ppo", {"loss/value_avg": curve(lambda x: 0.2 + 3 * x)}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_has_no_verdict(name):
    found = diagnosis.verdicts(HEALTHY[name])
    assert found == []
    watched = diagnosis.watched(HEALTHY[name])
    assert len(watched) >= 3 and f"all {len(watched)} watched metrics" in diagnosis.summary(HEALTHY[name], found)


@pytest.mark.parametrize("name", ILL)
def test_each_illness_is_named_with_its_step_and_advice(name):
    base, ill, step = ILL[name]
    found = [v for v in diagnosis.verdicts({**HEALTHY[base], **ill}) if v.name == name]
    assert len(found) == 1, [v.name for v in diagnosis.verdicts({**HEALTHY[base], **ill})]
    assert not found[0].normal and found[0].advice and found[0].what
    assert step is None or abs(found[0].step - step) <= 3
    assert diagnosis.summary({**HEALTHY[base], **ill}, found) == ""


def test_every_rule_has_an_illness_above():
    """By what the rules return: a rule that no curve sets off would never be noticed to be broken."""
    spoken = set()
    for base, ill, _ in ILL.values():
        spoken |= {rule for rule in rules.RULES if rule({**HEALTHY[base], **ill}) is not None}
    normal = {rules.loss_near_zero_is_normal}
    assert set(rules.RULES) - spoken == normal


def test_what_looks_wrong_and_is_normal_is_said_to_be_so():
    grpo = HEALTHY["grpo"] | {"train/loss": curve(lambda x: 1e-4)}
    (verdict,) = diagnosis.verdicts(grpo)
    assert verdict.normal and "GRPO" in verdict.name and "no verdicts" in diagnosis.summary(grpo, [verdict])
    dpo = HEALTHY["dpo"] | {"logps/chosen": curve(lambda x: -20 - 7 * x), "logps/rejected": curve(lambda x: -21 - 30 * x)}
    (verdict,) = diagnosis.verdicts(dpo)
    assert verdict.normal and verdict.name == "chosen falls" and diagnosis.text(verdict).startswith("normal: ")


def test_a_short_run_is_no_evidence():
    short = {
        name: (steps[:5], values[:5]) for name, (steps, values) in {**HEALTHY["lm"], "train/loss": (STEPS, [4.0] * N)}.items()
    }
    found = diagnosis.verdicts(short)
    assert found == [] and "5 logged steps, fewer than" in diagnosis.summary(short, found)


def test_a_short_run_that_has_recovered_is_within_its_bounds():
    def found(values):
        return [v.name for v in diagnosis.verdicts({"completions/clipped_ratio": (STEPS[: len(values)], values)})]

    assert found([1.0, 1.0, 0.2, 0.1]) == [] and found([0.1, 0.2, 1.0, 1.0]) == found([0.9]) == ["completions/clipped_ratio"]
    assert [v.name for v in diagnosis.verdicts({"rewards/excluded": ([1, 2], [3.0, 0.0])})] == ["rewards/excluded"]  # 0, ever


@pytest.mark.parametrize("line", [[], [1.0], [0.0] * 30, [math.nan] * 30, [-1e30, 1e30] * 20])
def test_no_curve_breaks_a_rule(line):
    everything = {name: (list(range(1, len(line) + 1)), line) for name in diagnosis.WATCHED}
    everything |= {m.names[0]: everything["train/loss"] for section in metrics.SECTIONS.values() for m in section}
    diagnosis.verdicts(everything)


def test_what_is_watched_is_in_the_table():
    assert all(metrics.find(name) for name in diagnosis.WATCHED)
    assert metrics.find("rewards/my reward/mean").advice == "-" and metrics.find("train/nonsense") is None
    assert metrics.find("rewards/readable/mean").low == 0.5  # before rewards/<name>/mean
    assert metrics.bounds_text(metrics.find("val/ratio")) == "0.8 to 1.25"


def test_a_run_ends_with_its_verdicts(tmp_path, capsys):
    run = runs.open_run(tmp_path / "run", "toy", {})
    for step, value in zip(*ILL["loss flat"][1]["train/loss"], strict=True):
        run.log(step, {"train/loss": value, "train/lr": 0.0})
    result = run.finish({})
    names = [v["name"] for v in json.loads((run.workdir / "result.json").read_text())["verdicts"]]
    assert names == [v["name"] for v in result["verdicts"]] == ["learning rate 0", "loss flat"]
    assert "verdict  train/loss did not move" in capsys.readouterr().out
    page = (run.workdir / "report.html").read_text()
    assert page.rindex("<h3>Verdicts</h3>") > page.rindex("<details>") and "the learning rate was 0 at 60 of 60" in page


def test_a_healthy_run_ends_with_a_line_that_says_so(tmp_path, capsys):
    run = runs.open_run(tmp_path / "run", "toy", {})
    for i, step in enumerate(STEPS):
        run.log(step, {name: HEALTHY["lm"][name][1][i] for name in ("train/loss", "train/lr", "train/grad_norm")})
    assert run.finish({})["verdicts"] == []
    said = "no verdicts: all 3 watched metrics within their healthy ranges (3 logged)"
    assert said in capsys.readouterr().out and said in html.write_report(run.workdir).read_text()


def test_rows_that_were_cut_are_a_verdict(tmp_path, capsys):
    run = runs.open_run(tmp_path / "run", "toy", {})
    run.log(1, {"train/loss": 1.0})
    counts = {"examples": 200, "truncated": 11, "dropped": 0}
    report = {"chats.jsonl": counts, "held out": counts | {"truncated": 10}, "left out of chats.jsonl": {"rows": 1, "of": 201}}
    (run.workdir / "data_report.json").write_text(json.dumps(report))
    (verdict,) = run.finish({})["verdicts"]
    assert verdict["name"] == "data/truncated" and not verdict["normal"]
    said = "chats.jsonl: 11 of 200 examples (6%) are longer than data.length and were cut: raise `data.length`"
    assert said in capsys.readouterr().out


def test_a_value_that_was_not_finite_is_seen(tmp_path):
    run = runs.open_run(tmp_path / "run", "toy", {})
    for step in (1, 2, 3):
        run.log(step, {"train/loss": math.inf if step == 2 else 1.0})
    (verdict,) = diagnosis.of_run(run.workdir)[0]
    assert verdict.name == "not finite" and verdict.step == 2
