"""Weights between runs and published directories, either way; the source says which.

python -m experiments.convert --source=runs/sft --target=exported                # Orbax -> safetensors that transformers loads
python -m experiments.convert --source=Llama-3.2-1B --target=runs/llama          # safetensors -> a run to start from
python -m experiments.sft --config.init=runs/llama
python -m experiments.convert --source=runs/sft --target=adapter --adapter=True     # the adapters of a run -> PEFT's format
python -m experiments.convert --source=adapter --base=Llama-3.2-1B --target=runs/x  # merged into the weights they are for

An export has a model card (README.md) with what the run knows of itself; --license=apache-2.0 puts the licence on it.
A run is a run directory (`<dir>[@step]`, and --stage); a published directory has config.json, safetensors and the tokenizer's
files, or is a name on the hub (org/name).
"""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments import model_card
from jaxllm import launch
from jaxllm.adapt import lora
from jaxllm.convert import hf, hub, peft, safetensors
from jaxllm.convert.card import card
from jaxllm.core.types import TrainState, UserError
from jaxllm.data import chat
from jaxllm.data import tokenizer as tokenizers
from jaxllm.models import families
from jaxllm.report.console import printable
from jaxllm.train import checkpoint


def export(source, target, *, stage="", dtype="", architecture="", license=""):
    """A run's checkpoint as a published directory with a model card; the architecture that it has there."""
    loaded = launch.load(source, stage or None)
    if "policy" not in loaded.params:
        raise UserError(
            f"{loaded.workdir}: a {loaded.meta['experiment']} model has a head of its own: no published name holds it"
        )
    more = {"dtype": dtype or None, "architecture": architecture or None}
    written = partial(card, model_card.facts_of(loaded, target, license=license))
    return hf.save(target, loaded.model, loaded.params["policy"], loaded.tokenizer, card=written, **more)


def export_adapter(source, target, *, stage="", architecture="", license=""):
    """The adapters of a run as a directory with a card that PEFT loads onto the base; the architecture that they are for."""
    loaded = launch.load(source, stage or None, merged=False)
    given = loaded.meta.get("lora", {}).get("policy")
    if given is None:
        raise UserError(f"{loaded.workdir}: was trained without adapters of a policy: export its weights, without --adapter")
    adapters, more = loaded.params["policy"]["lora"], {n: given[n] for n in ("alpha", "scaling")}
    facts = model_card.facts_of(loaded, target, license=license, adapter=True)

    def written(name, parameters):
        return card(facts._replace(adapter=facts.adapter._replace(parameters=parameters)), name)

    more |= {"base": facts.adapter.base, "card": written}
    return peft.save(target, loaded.model, adapters, architecture=architecture or None, **more)


def with_adapter(directory, base):
    """(base directory, model, params) of an adapter in PEFT's format, merged into the weights that it is for."""
    base = base or str(safetensors.read_json(directory, peft.CONFIG).get("base_model_name_or_path") or "")
    if not base:
        raise UserError(f"{directory / peft.CONFIG} names no base: give --base, the published directory that it was trained on")
    where = Path(base) if Path(base).is_dir() else hub.fetch(base)
    model, params = hf.load(where)
    read = peft.load(directory, model)
    given = launch.lora_settings(read.settings)
    merged = lora.merge({**params, "lora": read.adapters}, alpha=given["alpha"], scaling=given["scaling"])
    return where, model, merged


def take_in(source, target, *, kind="pretrain", base=""):
    """A published directory as a run at step 0: checkpoint, tokenizer and chat template, whole or not at all.

    An adapter of PEFT is merged into `base`, the published directory that it is for (default: the one that it names).
    """
    target = Path(target).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: is there and not empty: give a new run directory, or remove it first")
    if kind not in launch.STAGES:
        raise UserError(f"--kind={kind}: choose one of {', '.join(launch.STAGES)}")
    directory = Path(source) if Path(source).is_dir() else hub.fetch(source)
    for file in directory.iterdir():
        safetensors.inside(directory, file.name)
    safetensors.scan(directory)  # weights that are not to be opened are named before anything else is missed
    if (directory / peft.CONFIG).exists():
        directory, model, params = with_adapter(directory, base)
        tokenizer = tokenizers.load(directory)
    else:
        tokenizer = tokenizers.load(directory)
        model, params = hf.load(directory)
    if tokenizer.vocab_size > model.config.vocab_size:
        sizes = f"its tokenizer has {tokenizer.vocab_size} ids, its weights {model.config.vocab_size}"
        raise UserError(f"{source}: {sizes}: they do not belong together")
    part = target.with_name(f".{target.name}.part-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    try:
        write_run(part, model, params, tokenizer, kind, {"source": str(source)})
        os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_run(workdir, model, params, tokenizer, kind, config):
    """A run directory with one checkpoint, which `launch.load` and the next stage read."""
    tokenizers.save(tokenizer, workdir / "tokenizer")
    meta = {
        "experiment": kind, "model": families.to_dict(model.config), "roots": ["policy"],
        "tokenizer": tokenizers.fingerprint(tokenizer), "template": chat.template_hash(tokenizer), "config": config, "turns": 1,
        "versions": {"jax": jax.__version__},
    }  # fmt: skip
    store = checkpoint.open_checkpoints(workdir)
    store.save(TrainState(jnp.int32(0), {"policy": params}, {"none": jnp.zeros(())}), {}, meta)
    store.close()


def is_run(source):
    """Whether a source is a run directory, or something to take in: a published directory, or a name on the hub."""
    directory = Path(source.partition("@")[0])
    if source == "latest" or (directory / "checkpoints").is_dir():
        return True
    if directory.is_dir():
        return any((directory / stage / "checkpoints").is_dir() for stage in launch.STAGES)
    return not hub.NAME.fullmatch(source)


def main(source="", target="", stage="", dtype="", architecture="", kind="pretrain", adapter=False, base="", license=""):
    if not source or not target:
        raise UserError("give --source and --target: a run and a new directory, or a published directory and a new run")
    if is_run(source) and adapter:
        if dtype or base:
            raise UserError("--dtype is for whole weights, --base for adapters that are taken in: an adapter is float32")
        architecture = export_adapter(source, target, stage=stage, architecture=architecture, license=license)
        return print(f"{target}: an adapter for {architecture}, as PEFT loads it")
    if is_run(source):
        architecture = export(source, target, stage=stage, dtype=dtype, architecture=architecture, license=license)
        return print(f"{target}: {architecture}, as transformers loads it")
    if stage or dtype or architecture or adapter or license:
        names = "--stage, --dtype, --architecture, --license and --adapter"
        raise UserError(f"{names} are for exports of a run; a run's parameters are float32")
    take_in(source, target, kind=kind, base=base)
    tokenizer = tokenizers.load(Path(target) / "tokenizer")
    print(f"chat template (sha256 {chat.template_hash(tokenizer)[:12]}), text of the model's authors that decides what it reads:")
    print("".join(f"  | {line}\n" for line in printable(chat.template_text(tokenizer)).split("\n")), end="")
    print(f"{target}: a run to start from: --config.init={target}")


if __name__ == "__main__":
    texts = dict.fromkeys(("source", "target", "stage", "dtype", "architecture", "base", "license"), "")
    launch.tool(main, "convert", {**texts, "kind": "pretrain", "adapter": False})
