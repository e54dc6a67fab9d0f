"""The study of over-optimisation, at a size where its numbers mean nothing, ends in claims, figures and a paragraph."""

import json

from experiments.studies import over_optimisation
from jaxllm import launch

TINY = {
    "seeds": 2, "length": 6, "width": 8, "layers": 1, "pretrain_steps": 4, "pairs": (32, 64), "main_pairs": 64,
    "judge_widths": (8,), "judge_steps": 4, "judge_batch": 8, "kl_coefs": (0.1, 0.2), "steps": 4, "every": 2, "look": 16,
    "strings": 256, "best_of": (1, 4, 16), "match": 4, "batch_size": 8, "epochs": 1,
}  # fmt: skip


def test_claims_figures_and_findings(tmp_path, quick_compile):
    result = launch.start(over_optimisation.main, "studies.over_optimisation", TINY, tmp_path / "run")
    claims = {c["name"]: c for c in result["claims"]}
    gates = [n for n, c in claims.items() if c["kind"] == "gate"]
    assert len(gates) == 6 and claims["best-of-n's KL over log n - (n-1)/n, any n and seed"]["holds"]
    spread = claims["peak gold, 64 less 32 pairs"]
    assert spread["low"] <= spread["value"] <= spread["high"] and spread["kind"] == "finding"
    assert "Did not come out" in result["findings"] and "simulated" in result["findings"]
    assert {p.name for p in (tmp_path / "run" / "figures").iterdir()} >= {"over_optimisation.svg", "best_of_n.svg", "penalty.svg"}
    samples = [json.loads(line)["text"] for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 6 and all(len(s) == 6 for s in samples)
    # before the first step every policy is the reference
    assert result["metrics"]["8/64 pairs/peak_kl"] >= 0
