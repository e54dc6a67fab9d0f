"""The study of iterative DPO runs at a tiny size; its gate holds, and more passes continue the offline run."""

from experiments.studies import iterative_dpo
from jaxllm import launch

TINY = {
    "steps": 2, "batch_size": 8, "seeds": 2, "pretrain_steps": 4, "judge_steps": 4, "rounds": 3, "pairs": 16, "test_pairs": 32,
    "more_passes": 2, "length": 6, "width": 16, "layers": 1, "betas": (0.1,),
}  # fmt: skip


def test_runs_and_reports_rounds_and_staleness(quick_compile, tmp_path):
    result = launch.start(iterative_dpo.main, "studies.iterative_dpo", TINY, tmp_path)
    gates = [claim for claim in result["claims"] if claim["kind"] == "gate"]
    assert len(gates) == 1 and all(claim["holds"] for claim in gates)
    assert sum(claim["low"] is not None for claim in result["claims"]) >= 8
    assert "Did not come out" in result["findings"] and "simulated" in result["findings"]
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"gold.svg", "stale.svg"}
    metrics = result["metrics"]
    assert metrics["offline, more passes/kl"] > metrics["offline/kl"] > 0
    assert 0 <= metrics["offline/implicit/own"] <= 1
