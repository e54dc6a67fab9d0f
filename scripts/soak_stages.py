"""The tiny runs that scripts/soak.py kills: what each stage is told, and what it starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SENTENCES = ("the cat sat on the mat", "a dog ran over the hill", "rain fell on the old town", "she read a book at night")
SHARED = {"steps": 30, "batch_size": 8, "save_every": 2, "eval_every": 5, "log_every": 1, "save_seconds": 2.0, "gates": False}
SIZE = {
    "tokenizer": "byte", "data.length": 32, "model.d_model": 16, "model.n_heads": 2, "model.d_ff": 32, "model.n_layers": 1,
    "model.max_length": 96, "data.held_out": 0.1,
}  # fmt: skip
ONLINE = {"max_prompt": 20, "max_new_tokens": 6, "steps": 12}
SHORT = {**SHARED, "steps": 10}  # of the further stages
ROUND = {"samples": 4, "steps": 4, "batch_size": 4, "sample_batch": 48, "max_new_tokens": 16, "rewards": "length:3 + repetition"}


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def settings(root: Path, stage: str) -> dict[str, Any]:
    """The overrides of a tiny run of a stage; its data is written here, and what it starts from is in `root`."""
    data = root / "data"
    data.mkdir(parents=True, exist_ok=True)
    words = [s.split() for s in SENTENCES]
    rows = [(f"say {w[i % 5]} {i}", w[(i + 1) % 5], w[(i + 2) % 5] + " no") for i in range(40) for w in words[i % 4 : i % 4 + 1]]
    start = {**SHARED, "init": str(root / "sft")}
    prompts = write(data / "prompts.jsonl", [{"prompt": p, "answer": c} for p, c, _ in rows])
    pairs = write(data / "pairs.jsonl", [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in rows])
    texts = write(data / "text.jsonl", [{"text": f"{i} {SENTENCES[i % 4]}"} for i in range(60)])
    chats = write(data / "chat.jsonl", [{"prompt": p, "completion": c} for p, c, _ in rows])
    found = {
        "pretrain": {**SHARED, **SIZE, "data.path": texts},
        "sft": {**SHARED, "init": str(root / "pretrain"), "data.path": chats, "data.length": 32, "data.held_out": 0.2},
        "reward": {**start, "data.path": pairs, "data.length": 32},
        "dpo": {**start, "data.path": pairs, "data.length": 32},
        "ppo": {**start, **ONLINE, "reward_model": str(root / "reward"), "data.path": prompts, "kl_target": 2.0},
        "grpo": {
            **start, "batch_size": 4, "group": 2, "rewards": "length:3 + repetition", "data.path": prompts,
            "max_new_tokens": 6, "steps": 12,
        },
    }  # fmt: skip
    return (found | further(root, data, rows, found))[stage]


def without(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def further(root: Path, data: Path, rows: list[tuple[str, str, str]], first: dict) -> dict[str, dict[str, Any]]:
    """The same of the stages that are not killed unless asked for."""
    start, text = {**SHORT, "init": str(root / "sft")}, {**SHORT, **SIZE, "data.path": first["pretrain"]["data.path"]}
    labels = write(data / "labels.jsonl", [{"text": p, "label": str(len(c) % 2)} for p, c, _ in rows])
    rounds = {**ROUND, "init": str(root / "sft"), "data.path": first["grpo"]["data.path"]}
    return {
        "kto": {**start, "data.path": first["dpo"]["data.path"], "data.length": 32},
        "mlm": text,
        "classify": {**SHORT, "init": str(root / "mlm"), "data.path": labels, "data.length": 32},
        "moe": {**text, "model.moe.n_experts": 4, "model.moe.d_ff": 16},
        "t5": {**text, "model.head_dim": 4},
        "lstm": without(text, "model.n_heads", "model.d_ff", "model.n_layers") | {"model.d_hidden": 16},
        "imagegpt": {
            **without({**SHORT, **SIZE}, "tokenizer", "data.length"), "data.size": 8, "data.colours": 8, "data.images": 60,
            "probe.rows": 0, "samples": 2,
        },
        "flamingo": {
            **SHORT, "init": str(root / "pretrain"), "data.images": 40, "data.test": 20, "data.length": 80, "vision.steps": 3,
            "vision.batch_size": 8, "model.d_vision": 16, "model.n_latents": 2, "model.n_heads": 2, "model.vision.n_layers": 1,
            "model.vision.n_heads": 2,
        },
        "iterative_dpo": {**rounds, "rounds": 2, "judge": "rewards"},
        "rejection_sampling": {**rounds, "rounds": 2, "right": -9.0, "select": "every", "train_from": "latest"},
    }  # fmt: skip


# what a stage starts from, in the order in which they can be made
NEEDS = {
    "pretrain": (), "sft": ("pretrain",), "reward": ("pretrain", "sft"), "dpo": ("pretrain", "sft"),
    "ppo": ("pretrain", "sft", "reward"), "grpo": ("pretrain", "sft"), "kto": ("pretrain", "sft"), "mlm": (),
    "classify": ("mlm",), "moe": (), "t5": (), "lstm": (), "imagegpt": (), "flamingo": ("pretrain",),
    "iterative_dpo": ("pretrain", "sft"), "rejection_sampling": ("pretrain", "sft"),
}  # fmt: skip
