"""The rows: who does the same work, what must hold, and the arithmetic from seconds to JSON and to a table."""

from __future__ import annotations

import importlib.util
import statistics
from importlib.metadata import version
from typing import Any, NamedTuple


class Rival(NamedTuple):
    """One row: who does the same work, and what must hold."""

    target: str  # module:function
    must: float | None
    needs: tuple[str, ...] = ()  # packages
    better: str = "more"
    asked: bool = False  # only measured when named, or with --all


class Probe(NamedTuple):
    """Rows that one child measures by itself, and what must hold for each."""

    target: str  # module:function of (shape, rounds), which gives the values of every round by the row's name
    rows: dict[str, float | None]
    needs: tuple[str, ...] = ()
    better: str = "less"


def torch_must(jax_version: str) -> float:
    """What must hold against PyTorch: from jax 0.12 on XLA multiplies with oneDNN on a CPU."""
    return 0.80 if tuple(int(n) for n in jax_version.split(".")[:2]) >= (0, 12) else 0.75


OURS = {name: f"benchmarks.ours:{name}" for name in ("train_step", "generate", "generate_one_device")}
OURS["moe_step"] = "benchmarks.moe:sparse"
OURS |= {name: f"benchmarks.alignment:{name}" for name in ("dpo_step", "grpo_iteration")}
HF, TRL = ("torch", "transformers"), ("torch", "transformers", "trl")
TORCH_MUST = torch_must(version("jax"))
RIVALS = {
    "train_step/hand_written_jax": Rival("benchmarks.hand_written:train_step", 0.97),
    "train_step/hand_written_jax_logsumexp": Rival("benchmarks.hand_written:train_step_logsumexp", None),
    "train_step/flax_linen": Rival("benchmarks.flax_linen:train_step", 1.15),
    "train_step/flax_nnx": Rival("benchmarks.flax_nnx:train_step", 1.15),
    "train_step/torch_eager": Rival("benchmarks.torch_eager:train_step", TORCH_MUST, ("torch",)),
    "train_step/torch_compiled": Rival("benchmarks.torch_compiled:train_step", None, ("torch",), asked=True),
    "train_step/hf_trainer": Rival("benchmarks.hf_trainer:train_step", TORCH_MUST, HF),
    "train_step/products_jax": Rival("benchmarks.ceilings:train_step", None),
    "train_step/products_torch": Rival("benchmarks.ceilings:train_step_torch", None, ("torch",)),
    "generate/transformers": Rival("benchmarks.hugging_face:generate", 2.0, HF),
    "generate_one_device/transformers": Rival("benchmarks.hugging_face:generate", None, HF),
    "dpo_step/trl": Rival("benchmarks.trl_trainers:dpo_step", 1.1, TRL),
    "dpo_step/trl_precomputed": Rival("benchmarks.trl_trainers:dpo_step_precomputed", None, TRL),
    "grpo_iteration/trl": Rival("benchmarks.trl_trainers:grpo_iteration", 1.7, TRL),
    "moe_step/dense": Rival("benchmarks.moe:dense", 1.25, better="less"),
}
PROBES = {
    "loss": Probe("benchmarks.memory:loss", {"loss_memory/naive": 0.25, "loss_step/naive": 1.03}),
    "loader": Probe("benchmarks.loader:steps", {"loader/synthetic": 0.98}, better="more"),
    "imports": Probe("benchmarks.startup:imports", {"import/jax": 1.3, "import_training/jax": None}),
    "starts": Probe(
        "benchmarks.startup:starts", {"first_step/trl": 0.6, "second_start/first": 0.25, "second_compile/first": None}
    ),
    "plan": Probe("benchmarks.pods:collectives", {"plan/collective_bytes": 1.1, "plan_simulated/collective_bytes": None}),
    "h200_train": Probe(
        "benchmarks.gpu:train", {"h200/gpt2_124m_t1024": 0.45, "h200/1b_t4096": 0.50, "h200/8b_slice_t8192": 0.52}, better="more"
    ),
    "h200_decode": Probe("benchmarks.gpu:decoding", {"h200/decode_1": 0.70, "h200/decode_64": 0.55}, better="more"),
}
NAMES = [*RIVALS, *(name for probe in PROBES.values() for name in probe.rows)]

OUTSIDE = 0.05  # of a GRPO iteration: the most that may go by between generation and training


def installed(needs: tuple[str, ...]) -> bool:
    return all(importlib.util.find_spec(package) for package in needs)


def of_values(name: str, values: list[float], must: float | None, better: str) -> dict[str, Any]:
    """The JSON row of what every round gave: the median and the quartiles; null figures where nothing was measured."""
    low = ratio = high = None
    if len(values) == 1:
        low = ratio = high = values[0]
    elif values:
        low, ratio, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"name": name, "ratio": ratio, "low": low, "high": high, "must": must, "better": better}


def row(name: str, ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """The JSON row of a rival, from the seconds of every round (none: not installed)."""
    rival = RIVALS[name]
    pairs = zip(ours, theirs, strict=True) if theirs else ()
    return of_values(name, [b / a if rival.better == "more" else a / b for a, b in pairs], rival.must, rival.better)


def holds(r: dict[str, Any]) -> bool:
    """Whether the median of a measured row keeps to what must hold."""
    return r["must"] is None or (r["ratio"] >= r["must"] if r["better"] == "more" else r["ratio"] <= r["must"])


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'name':38} {'ratio':>7} {'quartiles':>15} {'must':>8}"]
    for r in rows:
        bound = "-" if r["must"] is None else f"{'>=' if r['better'] == 'more' else '<='} {r['must']:g}"
        if r["ratio"] is None:
            lines.append(f"{r['name']:38} {'not measured':>23} {bound:>8}")
            continue
        verdict = "reported" if r["must"] is None else "holds" if holds(r) else "FAILS"
        quartiles = f"{r['low']:.3f}-{r['high']:.3f}"
        lines.append(f"{r['name']:38} {r['ratio']:7.3f} {quartiles:>15} {bound:>8} {verdict}")
    return "\n".join(lines)
