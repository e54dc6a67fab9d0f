"""What a check shrinks: built-in data, models of published sizes, meshes of other machines, runs that a stage starts from."""

from __future__ import annotations

import math
from typing import Any

import jax

from experiments import verifiable
from jaxllm.worlds import instr

# settings of built-in data, which the user's own does not have
DATA = {"data.characters": 120_000, "data.rows": 512, "data.images": 512, "data.test": 8, "data.eval_rows": 64, "data.limit": 512}
OTHER = {
    "vision.steps": 2, "probe.rows": 0, "samples": 4, "prompts": 16, "held_out": 8, "pair_prompts": 16, "sample_batch": 32,
}  # fmt: skip
PAIRS = 96  # preference rows of a stage that would first have to collect its own
WIDE, DEEP, MANY = 256, 8, 8192  # a model beyond one of these is made small
FRESH = {  # of a run that a stage would train first: a fresh model on little of the built-in data
    "pretrain": {"data.characters": 120_000}, "sft": {"data.rows": 256}, "reward": {}, "mlm": {"data.characters": 120_000},
}  # fmt: skip


def leaf(config: Any, name: str) -> Any:
    """A setting by its path; None where the config has none."""
    for part in name.split("."):
        if config is None or part not in config:
            return None
        config = config[part]
    return config


def changes(config: Any) -> dict[str, Any]:
    """What the doctor sets otherwise, {setting: value}."""
    wanted: dict[str, Any] = {}
    if not leaf(config, "data.path"):
        wanted |= {n: x for n, x in DATA.items() if (leaf(config, n) or 0) > x}
    wanted |= {n: x for n, x in OTHER.items() if isinstance(leaf(config, n), int) and leaf(config, n) > x}
    if "mesh" in config and math.prod(abs(x) for x in config.mesh.values()) > jax.device_count():
        wanted |= {f"mesh.{axis}": 1 for axis, x in config.mesh.items() if x != 1}
    model = leaf(config, "model")
    if model is not None and large(config):
        wanted |= {f"model.{n}": x for n, x in shape(model).items()}
        wanted |= {n: least for n, least in (("batch_size", 8 * config.accumulate),) if config[n] > least}
        trained = leaf(config, "tokenizer") in ("bpe", "unigram")
        wanted |= {"vocab_size": 1024} if trained and (leaf(config, "vocab_size") or 0) > 1024 else {}
        wanted |= {"data.length": 128} if (leaf(config, "data.length") or 0) > 128 and not leaf(config, "data.path") else {}
    return wanted


def large(config: Any) -> bool:
    """Whether the config's own model is more than a laptop's check can hold."""
    m = config.model
    return (leaf(m, "d_model") or 0) > WIDE or (leaf(m, "n_layers") or 0) > DEEP or (leaf(config, "vocab_size") or 0) > MANY


def shape(model: Any) -> dict[str, Any]:
    """Sizes of a small model of the same kind: the same parts, heads in the same proportion."""
    heads = leaf(model, "n_heads") or 1
    grouped = leaf(model, "n_kv_heads")
    sizes = {
        "d_model": 64, "n_layers": 2, "decoder_layers": 2, "encoder_layers": 2, "n_heads": 4, "d_ff": 128, "head_dim": 16,
        "d_kv": 16, "dense_layers": 1, "mtp_layers": 1, "moe.n_experts": 8, "moe.d_ff": 32, "moe.top_k": 2, "moe.n_groups": 2,
        "moe.topk_groups": 1, "d_hidden": 64, "d_projection": 64,
    }  # fmt: skip
    found = {n: x for n, x in sizes.items() if isinstance(leaf(model, n), int) and leaf(model, n) > x}
    if grouped:
        found["n_kv_heads"] = max(1, 4 * grouped // heads)
    return found


def made_up(directory: Any, seed: int) -> str:
    """A directory of preference rows as `experiments.pairs` leaves it: a demonstration, and the one of another prompt."""
    rows = instr.demonstrations(PAIRS + 1, seed=seed)
    said = [row["messages"] for row in rows]
    pairs = [
        {"prompt": a[:-1], "chosen": [a[-1]], "rejected": [b[-1]]} for a, b in zip(said, said[1:], strict=False) if a[-1] != b[-1]
    ]
    directory.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", pairs), ("held_out", pairs[: len(pairs) // 4])):
        verifiable.write_rows(directory / f"{name}.jsonl", part)
    return str(directory)
