"""What notebooks show: a model's text is never markup, and curves are the logged numbers."""

import json
from types import SimpleNamespace

from jaxllm.report import notebook


def test_what_a_model_wrote_stays_text():
    shown = notebook.table(("prompt", "answer"), [("hi", "<script>alert(1)</script>"), (0.123456, None)])
    assert "<script>" not in shown and "&lt;script&gt;" in shown and ">0.123<" in shown and shown.count("<tr>") == 3


def test_tokens_that_the_loss_counts_are_green():
    shown = notebook.boxes(SimpleNamespace(piece=["<a>", "b"].__getitem__), [0, 1], [False, True])
    assert "&lt;a&gt;" in shown and shown.index("#e5e7eb") < shown.index("#86efac") and shown.count("<span") == 2


def test_curves_over_steps_and_against_a_metric(tmp_path):
    rows = [{"step": 1, "kl": 0.0, "score": 0.5}, {"step": 2, "kl": 0.4, "score": None}, {"step": 3, "kl": 0.7, "score": 0.9}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert ">step<" in notebook.curves(tmp_path, "score") and ">kl<" in notebook.curves(tmp_path, "score", against="kl")
    assert "no data" in notebook.curves(tmp_path, "missing") and notebook.row("a", "b").count("<div") == 1
