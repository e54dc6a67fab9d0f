"""The study of frontiers, at a size where its numbers mean nothing, ends in claims, figures and a paragraph."""

from experiments.studies import dpo_ppo_frontier
from jaxllm import launch

TINY = {
    "seeds": 2, "length": 6, "width": 8, "judge_width": 8, "layers": 1, "pretrain_steps": 4, "pairs": 32, "judge_steps": 4,
    "betas": (0.1, 1.0), "alphas": (0.0, 1.0), "steps": 2, "every": 1, "batch_size": 8, "kl_coefs": (0.1, 0.3), "rl_steps": 2,
    "rl_every": 1, "rl_batch": 8, "epochs": 1, "best_of": (1, 4), "strings": 256, "look": 16,
}  # fmt: skip


def test_claims_figures_and_findings(tmp_path, quick_compile):
    result = launch.start(dpo_ppo_frontier.main, "studies.dpo_ppo_frontier", TINY, tmp_path / "run")
    claims = {c["name"]: c for c in result["claims"]}
    assert sum(c["kind"] == "gate" for c in claims.values()) == 2
    area = claims["hull area, DPO less PPO, gold"]
    assert area["low"] <= area["value"] <= area["high"] and area["kind"] == "finding"
    assert all(method in result["findings"] for method in dpo_ppo_frontier.METHODS) and "Did not come out" in result["findings"]
    assert (tmp_path / "run" / "figures" / "frontier.svg").is_file()
    metrics = result["metrics"]
    assert (
        metrics["best-of-n/kl"] <= 2 and metrics["DPO/flops"] > 0 and all(metrics[f"{m}/hull_area"] >= 0 for m in ("DPO", "PPO"))
    )
