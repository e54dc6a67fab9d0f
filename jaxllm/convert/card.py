"""The model card of an export: README.md with a YAML head, from what a run knows and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

# what an architecture is for, in the hub's words
PIPELINES = {
    "ForCausalLM": "text-generation", "LMHeadModel": "text-generation", "ForMaskedLM": "fill-mask", "ForPreTraining": "fill-mask",
    "T5ForConditionalGeneration": "text2text-generation",
}  # fmt: skip


class Stage(NamedTuple):
    """One run of the chain that led to the weights. data: a file, `hf:name`, or "" for what the experiment has built in; command:
    "" where it is not known."""

    experiment: str
    step: int
    config: Mapping[str, Any]
    data: str
    command: str = ""


class Adapter(NamedTuple):
    """Low-rank adapters that are exported without the weights below them: of so many numbers, on kernels that match.

    base: the published model that they are for, by its name on the hub; run: else the run whose export they are for.
    """

    rank: int
    alpha: float
    scaling: str
    match: str
    base: str = ""
    run: str = ""
    parameters: int = 0


class Facts(NamedTuple):
    """What is known. lineage: from the first run to the one that is exported, which `source` may precede: a published model.

    metrics and claims: of the run's result.json; None where it has none, or where it is not of this checkpoint. adapter: what is
    exported, where it is not the whole model, whose `parameters` are the base's.
    """

    name: str
    parameters: int
    config: Any
    lineage: tuple[Stage, ...]
    source: str = ""
    metrics: Mapping[str, float] | None = None
    claims: tuple[Mapping[str, Any], ...] = ()
    versions: Mapping[str, str] = {}
    commit: str = ""
    license: str = ""
    adapter: Adapter | None = None


def card(facts: Facts, architecture: str) -> str:
    """README.md: a YAML head with what the hub reads, then what the model is, from which data, how trained, how it measured.

    A field of the head whose value the run does not know is left out: a licence, a base model that is a path, data sets that are
    files.
    """
    import yaml

    sections = (
        ("", _what(facts, architecture)), ("Data", _data(facts)), ("Training", _training(facts)),
        ("Evaluation", _evaluation(facts)), ("Limits", _limits(facts)), ("How to load it", _loading(facts, architecture)),
        ("Reproduce", _reproduce(facts)),
    )  # fmt: skip
    head = yaml.safe_dump(front_matter(facts, architecture), sort_keys=False, allow_unicode=True)
    body = "\n\n".join((f"## {title}\n\n" if title else "") + text for title, text in sections)
    return f"---\n{head}---\n\n# {facts.name}\n\n{body}\n"


def front_matter(facts: Facts, architecture: str) -> dict[str, Any]:
    """The head of the card, without what is not known."""
    named = [stage.data.removeprefix("hf:").split(":")[0] for stage in facts.lineage if stage.data.startswith("hf:")]
    base = facts.adapter.base if facts.adapter else facts.source
    base = base if _on_hub(base) else ""
    kind = ["lora", *([f"base_model:adapter:{base}"] if base else [])] if facts.adapter else []
    found = {
        "license": facts.license, "base_model": base,
        "datasets": list(dict.fromkeys(named)),
        "pipeline_tag": next((tag for end, tag in PIPELINES.items() if architecture.endswith(end)), ""),
        "library_name": "peft" if facts.adapter else "transformers",
        "metrics": [name.removeprefix("eval/") for name in facts.metrics or {} if name.startswith("eval/")],
        "tags": ["jaxllm", *([facts.lineage[-1].experiment] if facts.lineage else []), *kind],
    }  # fmt: skip
    return {name: value for name, value in found.items() if value}


def _on_hub(source: str) -> bool:
    from jaxllm.convert import hub

    return bool(hub.NAME.fullmatch(source))


def _what(facts: Facts, architecture: str) -> str:
    c, last = facts.config, facts.lineage[-1]
    length = getattr(c, "max_length", None)
    context = f" and a context of {length:,} tokens" if length else ""
    made = f"The checkpoint of stage `{last.experiment}` of jaxllm {facts.versions.get('jaxllm', '')}".rstrip()
    size = f"{facts.parameters:,} parameters, a vocabulary of {c.vocab_size:,}{context}"
    if (a := facts.adapter) is None:
        return f"`{architecture}` with {size}. {made} at step {last.step:,}."
    how = f"LoRA of rank {a.rank}, alpha {a.alpha:g} and {a.scaling} scaling on the kernels that match `{a.match}`"
    where = f"for a `{architecture}` with {size}, which is not here"
    return f"{how}: {a.parameters:,} numbers, {where}. {made} at step {last.step:,}."


def _data(facts: Facts) -> str:
    built_in = "built into jaxllm: its own texts or tasks, and what models said to them"
    lines = [f"- `{s.experiment}`: {f'`{s.data}`' if s.data else built_in}" for s in facts.lineage if s.step]
    return "\n".join(lines) or "This run trained on nothing: its weights are those that it took in."


def positions(stage: Stage) -> int | None:
    """Positions of the batches that a stage has read, padding included; None where its settings do not say."""
    length = stage.config.get("data", {}).get("length") if stage.experiment in ("pretrain", "sft", "moe", "lstm", "mlm") else None
    return stage.step * stage.config["batch_size"] * length if length and "batch_size" in stage.config else None


def _training(facts: Facts) -> str:
    begins = f"It began from `{facts.source}`.\n\n" if facts.source else ""
    rows = ["| stage | steps | batch size | learning rate | tokens, padding included |", "|---|---:|---:|---:|---:|"]
    for s in facts.lineage:
        if s.step:
            read, rate = positions(s), s.config.get("optim", {}).get("lr", "")
            cells = (s.config.get("batch_size", ""), rate, f"{read:,}" if read else "not recorded")
            rows.append(f"| `{s.experiment}` | {s.step:,} | " + " | ".join(map(str, cells)) + " |")
    settings = json.dumps(facts.lineage[-1].config, indent=2, sort_keys=True, default=str)
    details = f"Every setting of the last stage:\n\n```json\n{settings}\n```"
    return begins + ("\n".join(rows) + "\n\n" if len(rows) > 2 else "") + details


def _evaluation(facts: Facts) -> str:
    if facts.metrics is None:
        return "None: the run has no result for this checkpoint."
    rows = [f"| `{name}` | {value:.6g} |" for name, value in facts.metrics.items() if isinstance(value, int | float)]
    text = "By the run itself, at its end; names with `eval/` are of held-out rows. jaxllm's `docs/metrics.md` has formulas."
    text += "\n\n" + "\n".join(["| metric | value |", "|---|---:|", *rows])
    claims = "\n".join(map(_claim, facts.claims))
    explained = "Claims of the run: a gate has to hold, a finding is reported either way.\n\n"
    return text + (f"\n\n{explained}{claims}" if claims else "")


def _claim(claim: Mapping[str, Any]) -> str:
    """- gate holds: it answers, 0.9 [0.85, 0.95] (bound >= 0.5)."""
    sign = {"more": ">= ", "less": "<= "}.get(claim.get("better", ""), "")
    ends = [claim.get("low"), claim.get("high")]
    interval = "" if None in ends else f" [{ends[0]:.3g}, {ends[1]:.3g}]"
    value = "not a number" if claim["value"] is None else f"{claim['value']:.6g}"
    said = "holds" if claim["holds"] else "does not hold"
    return f"- {claim.get('kind', 'gate')} {said}: {claim['name']}, {value}{interval} (bound {sign}{claim['bound']:g})"


def _limits(facts: Facts) -> str:
    lines = ["- What is not in the table above was not measured: bias, safety and truth of what it says among it."]
    if any(stage.step and not stage.data for stage in facts.lineage):
        lines.append("- Some of its data is built into jaxllm, Python's own text or a synthetic world: no source of knowledge.")
    if (length := getattr(facts.config, "max_length", None)) is not None:
        lines.append(f"- Sequences of more than {length:,} tokens are beyond its context.")
    return "\n".join(lines if facts.license else [*lines, "- No licence is stated: the run does not know one."])


def _loading(facts: Facts, architecture: str) -> str:
    name = facts.name
    if facts.adapter:
        return _joining(facts.adapter, name, architecture)
    lines = (
        "```python", f"from transformers import AutoTokenizer, {architecture}", "",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")', f'model = {architecture}.from_pretrained("{name}")', "```", "",
        "```python", "from jaxllm.convert import hf", "", f'model, params = hf.load("{name}")', "```",
    )  # fmt: skip
    return "\n".join(lines)


def _joining(adapter: Adapter, name: str, architecture: str) -> str:
    base, before = adapter.base or "BASE", ""
    if not adapter.base:
        export = f"\n\n```\npython -m experiments.convert --source={adapter.run} --target=BASE\n```" if adapter.run else ""
        before = f"The base is the export of the run that this one began from.{export}\n\n"
    lines = (
        "```python", "from peft import PeftModel", f"from transformers import {architecture}", "",
        f'model = PeftModel.from_pretrained({architecture}.from_pretrained("{base}"), "{name}")', "```", "",
        "```", f"python -m experiments.convert --source={name} --base={base} --target=runs/joined", "```",
    )  # fmt: skip
    return before + "\n".join(lines)


def _reproduce(facts: Facts) -> str:
    known = [f"{name} {version}" for name, version in facts.versions.items()]
    known += [f"commit {facts.commit}"] if facts.commit else []
    lines = [stage.command or f"# {stage.experiment}: its command was not recorded" for stage in facts.lineage]
    command = "\n".join(["```", *lines, "```"]) + "\n\nOther runs that a command names have theirs in their README.txt."
    return command + (f"\n\n{', '.join(known)}." if known else "")
