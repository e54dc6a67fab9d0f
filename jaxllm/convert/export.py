"""A Model with parameters to a directory that transformers loads."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.convert import safetensors, vocabulary
from jaxllm.convert.layout import DTYPES, expected, families, place
from jaxllm.convert.names import Family, Leaf
from jaxllm.core.tree import flatten
from jaxllm.core.types import Model, Params, UserError

SHARD_BYTES = 5 * 10**9
# what a published config does not hold
NOT_ARCHITECTURE = {"attention": "auto", "dtype": "float32", "remat": "none", "unroll": False}


def save(
    path: str | Path, model: Model, params: Params, tokenizer: Any = None, *,
    dtype: str | None = None, architecture: str | None = None, shard_bytes: int = SHARD_BYTES,
    card: Callable[[str], str] | None = None,
) -> str:  # fmt: skip
    """Write a directory that transformers loads: config.json, safetensors (shards of shard_bytes), the tokenizer's files.

    dtype: of the weights on disk (default: the parameters' own). architecture: a name of config.json, where several hold this
    model; the default is the first that does, and is returned. card: README.md, from the architecture. The directory appears
    whole or not at all.
    UserError: the target has content, the parameters are not the model's, or no published architecture holds this config.
    """
    target = Path(os.path.expanduser(path)).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{path}: is there and not empty: export to a new directory, or remove it first")
    if jax.process_count() > 1:
        raise UserError("export from one process: the weights of several are not gathered here")
    family = _holds(model.config, architecture)
    leaves = family.leaves(model.config)
    _check_params(model, params, leaves)
    dtypes = {str(x.dtype) for x in jax.tree.leaves(params)}
    dtype = dtype or (dtypes.pop() if len(dtypes) == 1 else "float32")
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r}: choose one of {', '.join(DTYPES)}")
    part = _part_directory(target)
    try:
        _write_weights(part, model, flatten(params), leaves, np.dtype(DTYPES[dtype]), shard_bytes)
        _write_json(part / "config.json", _published(family, model.config, dtype, tokenizer))
        if tokenizer is not None:
            _write_tokenizer(part, tokenizer)
        if card is not None:
            (part / "README.md").write_text(card(family.architecture), encoding="utf-8")
        os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return family.architecture


def _holds(config: Any, architecture: str | None) -> Family:
    """The first family that gives the config back as it took it."""
    table, why = families(), []
    if architecture is not None and architecture not in table:
        raise UserError(f"architecture={architecture!r} is not supported: {', '.join(table)}")
    for family in [table[architecture]] if architecture else table.values():
        if not isinstance(config, family.record):
            continue
        try:
            back = _plain(family.config(family.to_config(config)))
        except UserError as error:
            why.append(f"{family.architecture}: {error}")
            continue
        if not (differ := _differences(_plain(config), back)):
            return family
        why.append(f"{family.architecture}: {differ}")
    raise UserError(f"no published architecture holds this {type(config).__name__}: {' | '.join(why) or 'none of its kind'}")


def _plain(config: Any) -> dict[str, Any]:
    """The fields that make the function: defaults filled in, and what only concerns running put aside."""
    have = {f.name for f in dataclasses.fields(config)}
    fields = dataclasses.asdict(dataclasses.replace(config, **{k: v for k, v in NOT_ARCHITECTURE.items() if k in have}))
    derived = (
        ("n_kv_heads", "kv_heads"), ("head_dim", "dim_head"), ("n_outputs", "outputs"),
        ("n_decoder_layers", "decoder_layers"), ("scaled", "scales"),
    )  # fmt: skip
    fields.update({field: getattr(config, name) for field, name in derived if hasattr(config, name)})
    fields.update({k: fields["bias"] for k in ("qkv_bias", "out_bias") if k in fields and fields[k] is None})
    if fields.get("windows"):  # layer by layer: a pattern may be written in several ways
        fields["windows"] = [fields["windows"][i % len(fields["windows"])] for i in range(config.n_layers)]
    if "attention_scale" in fields and fields["attention_scale"] is None and fields.get("mla") is None:
        fields["attention_scale"] = fields["head_dim"] ** -0.5
    if fields.get("moe"):  # on disk an expert takes every token that it is chosen for
        unused = {"capacity_factor"} | ({"group_score"} if fields["moe"]["n_groups"] == 1 else set())
        fields["moe"] = {k: v for k, v in fields["moe"].items() if k not in unused}
    if isinstance(fields.get("trunk"), dict):  # of a head on a trunk
        fields["trunk"] |= {k: v for k, v in NOT_ARCHITECTURE.items() if k in fields["trunk"]}
    for name in _idle(fields):
        fields.pop(name, None)
    return fields


def _idle(fields: dict) -> list[str]:
    """Settings that these others leave without effect."""
    idle = ["rope_theta", "rope_scaling"] if fields.get("positions") == "learned" else []
    idle += ["n_kv_heads", "head_dim"] if fields.get("mla") else []
    idle += ["d_ff"] if fields.get("moe") and not fields["dense_layers"] else []
    return idle + ([] if fields.get("windows") else ["local_rope_theta"])


def _differences(ours: dict, theirs: dict) -> str:
    return ", ".join(f"{k}={v!r} would become {theirs.get(k)!r}" for k, v in ours.items() if v != theirs.get(k))


def _check_params(model: Model, params: Params, leaves: list[Leaf]) -> None:
    specs, have, table = flatten(model.specs), flatten(params), {p for leaf in leaves for p in leaf.paths}
    if extra := sorted(set(have) - table):
        raise UserError(
            f"parameters that the published architecture has no place for (merge adapters first): {', '.join(extra[:5])}"
        )
    wrong = [f"{p}: {getattr(have.get(p), 'shape', 'missing')}, the model has {specs[p].shape}" for p in sorted(table)
             if p not in have or have[p].shape != specs[p].shape]  # fmt: skip
    if wrong:
        raise UserError(f"the parameters are not the model's: {'; '.join(wrong[:5])}")


def _part_directory(target: Path) -> Path:
    """A fresh sibling to write into; those that killed exports left behind are removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for old in target.parent.glob(f".{target.name}.part-*"):
        pid = old.name.rpartition("-")[2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(old, ignore_errors=True)
    part = target.parent / f".{target.name}.part-{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    return part


def _write_weights(
    directory: Path, model: Model, params: Mapping[str, jax.Array], leaves: list[Leaf], dtype: np.dtype, limit: int
) -> None:
    """All tensors, the float32 ones first (the format wants every tensor aligned), in shards of up to `limit` bytes."""
    leaves = sorted(leaves, key=lambda leaf: not leaf.float32)
    shapes = expected(leaves, model)
    wide = {n for leaf in leaves if leaf.float32 for n in expected([leaf], model)}
    planned = [(n, np.dtype(np.float32) if n in wide else dtype, shape) for n, shape in shapes.items()]
    shards: list[list] = [[]]
    room = limit
    for item in planned:
        size = math.prod(item[2]) * item[1].itemsize
        if shards[-1] and size > room:
            shards.append([])
            room = limit
        shards[-1].append(item)
        room -= size
    arrays = tensors(model, params, leaves, dtype)
    n = len(shards)
    names = ["model.safetensors"] if n == 1 else [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    for name, items in zip(names, shards, strict=True):
        safetensors.write(directory / name, items, itertools.islice(arrays, len(items)))
    if n > 1:
        total = sum(math.prod(shape) * kind.itemsize for _, kind, shape in planned)
        weight_map = {item[0]: name for name, items in zip(names, shards, strict=True) for item in items}
        _write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def tensors(model: Model, params: Mapping, leaves: list[Leaf], dtype: np.dtype) -> Iterator[np.ndarray]:
    """The published tensors in the order of `expected`, one entry of a stack fetched at a time."""
    specs = flatten(model.specs)
    for leaf in leaves:
        where = place(leaf, specs, model.config.vocab_size)
        for index in itertools.product(*map(range, where.lead)):
            ours = [np.asarray(params[p][index] if index else params[p]) for p in leaf.paths]
            cut = [a[tuple(slice(0, n) for n in shape)] for a, shape in zip(ours, where.shapes, strict=True)]
            for tensor in leaf.write(cut):
                yield tensor.astype(np.float32 if leaf.float32 else dtype, copy=False)


def _published(family: Family, config: Any, dtype: str, tokenizer: Any) -> dict:
    """config.json: what transformers 5 reads and what older versions read."""
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if tokenizer is not None:
        ids = {f"{name}_token_id": tokenizer.specials.get(name) for name in ("bos", "eos", "pad")}
    head = {"architectures": [family.architecture], "model_type": family.model_type}
    return head | ids | family.to_config(config) | {"dtype": dtype, "torch_dtype": dtype}


def _write_tokenizer(directory: Path, tokenizer: Any) -> None:
    """The tokenizer's files, and the tokens that end a generation."""
    for name, content in vocabulary.files(tokenizer).items():
        (directory / name).write_bytes(content)
    specials = tokenizer.specials
    ends = list(dict.fromkeys(specials[name] for name in ("end", "eos") if name in specials))
    ids = {f"{name}_token_id": specials[name] for name in ("bos", "pad") if name in specials}
    _write_json(directory / "generation_config.json", {**ids, "eos_token_id": ends})


def _write_json(file: Path, record: dict) -> None:
    with file.open("w", encoding="utf-8") as f:
        json.dump(record, f, indent=2)
        f.flush()
        os.fsync(f.fileno())
