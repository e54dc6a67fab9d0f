"""A tiny life cycle on files, so that every stage runs in seconds."""

import json

import pytest

from experiments import pretrain, sft
from jaxllm import launch
from jaxllm.report import metrics
from jaxllm.report.run import Run

SENTENCES = [
    "the cat sat on the mat and looked at the moon", "a dog ran over the hill to the sea", "rain fell on the old town all day",
    "she read a book under the green tree", "we walked along the river until night", "the moon is far and the sea is deep",
]  # fmt: skip
MESH = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
TINY = {
    "model.d_model": 32, "model.n_heads": 4, "model.d_ff": 64, "model.n_layers": 2, "model.max_length": 96, "data.length": 32,
    "tokenizer": "byte", "batch_size": 8, "log_every": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def every_logged_metric_is_in_the_glossary(monkeypatch):
    """Whatever an experiment logs in a test has a row in jaxllm/report/metrics.py, and so in docs/metrics.md."""
    names, log = set(), Run.log
    monkeypatch.setattr(Run, "log", lambda run, step, values: (names.update(values), log(run, step, values))[1])
    yield
    unknown = sorted(name for name in names if metrics.find(name) is None)
    assert not unknown, f"logged without a row in jaxllm/report/metrics.py: {unknown}"


def write_rows(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """{text, chat, pairs, prompts}: paths of small data files."""
    root = tmp_path_factory.mktemp("data")
    texts = [f"{SENTENCES[i % 6]} {SENTENCES[(i * 5 + 1) % 6]} {i}" for i in range(120)]
    words = [t.split()[:3] for t in texts]
    return {
        "text": write_rows(root / "text.jsonl", [{"text": t} for t in texts]),
        "chat": write_rows(root / "chat.jsonl", [{"prompt": f"say {w[1]}", "completion": w[1]} for w in words]),
        "pairs": write_rows(
            root / "pairs.jsonl", [{"prompt": f"say {w[1]}", "chosen": w[1], "rejected": w[2] + " no"} for w in words]
        ),
        "prompts": write_rows(root / "prompts.jsonl", [{"prompt": f"say {w[1]}"} for w in words]),
    }


@pytest.fixture(scope="session")
def base(files, tmp_path_factory):
    """A run directory with `pretrain` and `sft` stages, three steps each, trained on a 2 x 2 x 2 mesh."""
    root = tmp_path_factory.mktemp("run")
    launch.start(pretrain.main, "pretrain", {**TINY, **MESH, "steps": 3, "data.path": files["text"]}, root / "pretrain")
    chat = {"steps": 3, "batch_size": 8, "data.path": files["chat"], "data.length": 32, "init": str(root), "log_every": 1}
    launch.start(sft.main, "sft", {**chat, **MESH}, root / "sft")
    return root
