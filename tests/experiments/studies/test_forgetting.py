"""The study of forgetting, at a size where its numbers mean nothing, ends in claims, figures and a paragraph."""

from experiments.studies import forgetting
from jaxllm import launch

TINY = {
    "seeds": 2, "length": 8, "width": 8, "layers": 1, "pretrain_steps": 4, "pairs": 32, "judge_steps": 4, "batch_size": 8,
    "steps": 4, "every": 2, "look": 16, "epochs": 1,
}  # fmt: skip


def test_claims_figures_and_findings(tmp_path, quick_compile):
    result = launch.start(forgetting.main, "studies.forgetting", TINY, tmp_path / "run")
    claims = {c["name"]: c for c in result["claims"]}
    gate = claims["change of either skill under RL without a reward, any seed"]
    assert gate["kind"] == "gate" and gate["holds"] and sum(c["kind"] == "gate" for c in claims.values()) == 1
    rise = claims["nats a token that the source's strings lose, kl_coef 0"]
    assert rise["low"] <= rise["value"] <= rise["high"] and rise["kind"] == "finding"
    assert "Did not come out" in result["findings"] and "simulated" in result["findings"]
    names = {p.name for p in (tmp_path / "run" / "figures").iterdir()}
    assert names >= {"nll_strings.svg", "copied.svg", "cost.svg"}
    metrics = result["metrics"]
    assert metrics["no reward/nll/strings"] == metrics["before/nll/strings"] != metrics["kl_coef 0/nll/strings"]
    assert metrics["ptx 1/nll/strings"] != metrics["kl_coef 0/nll/strings"]
