"""Published directories (config.json and safetensors) to a Model with parameters, and back."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxllm.convert import hub, safetensors
from jaxllm.convert.export import save
from jaxllm.convert.layout import DTYPES, check_names, check_size, expected, find_family, numbered, place, renamed
from jaxllm.convert.names import Family, Leaf
from jaxllm.core import sharding, spec
from jaxllm.core.tree import flatten, unflatten
from jaxllm.core.types import Model, Params, UserError

__all__ = ["from_pretrained", "load", "save"]

ALIGN = 64  # bytes


def load(
    path: str | Path, *, mesh: Mesh | None = None, rules: spec.Rules | None = None, dtype: str | None = None
) -> tuple[Model, Params]:
    """(model, params) of a local directory with config.json and safetensors, sharded or not.

    mesh, rules: where the parameters are born (default: one device). dtype: of parameters and activations; without it
    parameters are as the specs say (float32) and activations as config.json says. One tensor at a time passes through host
    memory. UserError: an architecture or setting that is not supported; names that are unknown or missing and shapes that
    differ (the first five, both shapes); pickled weights and files that claim what they should not.
    """
    directory = Path(os.path.expanduser(path))
    if not os.path.isdir(directory):
        raise UserError(f"{path}: no such directory (a name on the hub goes through hf.from_pretrained)")
    published = read_config(directory)
    family = find_family(published, directory)
    files = renamed(safetensors.scan(directory), family)
    model, leaves = _described(family, published, files, dtype, directory)
    return model, _read(leaves, model, files, mesh, rules or sharding.current_rules(), dtype)


def from_pretrained(name: str, *, revision: str | None = None, **more: Any) -> tuple[Model, Params]:
    """(model, params) of "org/name" on the hub; `more` as in `load`. What the cache has is not fetched again.

    UserError: no such name, no access, or no network and nothing in the cache.
    """
    return load(hub.fetch(name, revision=revision), **more)


def read_config(directory: Path) -> dict:
    """config.json. UserError when it is missing, or tells of quantised weights."""
    if not (directory / "config.json").exists():
        raise UserError(f"{directory}: no config.json: give the directory of a published model")
    published = safetensors.read_json(directory, "config.json")
    if published.get("quantization_config"):
        method = published["quantization_config"]
        method = method.get("quant_method", "?") if isinstance(method, dict) else "?"
        raise UserError(f"{directory}: its weights are quantised ({method}): get or make the bfloat16 ones")
    return published


def _described(family: Family, published: dict, files: Mapping, dtype: str | None, where: Path) -> tuple[Model, list[Leaf]]:
    """The model that config.json describes and its name table, those of the files. UserError when they differ or it is none."""
    try:
        model = _make(family.adjust(_with_dtype(family.config(published), published, dtype), files))
        check_size(model, files, where)
        leaves = family.leaves(model.config)
        check_names(files, expected(leaves, model), family.ignored, where)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:  # of values of another kind
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where / 'config.json'}: describes no {family.architecture} ({reason}): fetch it again") from error
    return model, leaves


def _with_dtype(config: Any, published: dict, dtype: str | None) -> Any:
    """Activations in the asked dtype, else in the published one where we know it."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r}: choose one of {', '.join(DTYPES)}")
    name = dtype or str(published.get("dtype") or published.get("torch_dtype") or "float32").removeprefix("torch.")
    return dataclasses.replace(config, dtype=name if name in DTYPES else "float32")


def _make(config: Any) -> Model:
    from jaxllm.models import families as models

    return models.make(config)


# ---- reading


def _read(leaves: list[Leaf], model: Model, files: Mapping, mesh: Mesh | None, rules: spec.Rules, dtype: str | None) -> Params:
    specs, vocab = flatten(model.specs), model.config.vocab_size
    here = SingleDeviceSharding(jax.devices()[0])
    where = dict.fromkeys(specs, here) if mesh is None else flatten(spec.shardings(model.specs, mesh, rules))
    params: dict[str, jax.Array] = {}
    buffer = _buffer(leaves, specs, vocab, files)
    for leaf in leaves:
        lead = place(leaf, specs, vocab).lead
        into = [_Target(specs[p], where[p], DTYPES[dtype] if dtype else specs[p].dtype, len(lead)) for p in leaf.paths]
        stacks = [_zeros(t) for t in into]
        for index in itertools.product(*map(range, lead)):
            arrays = leaf.read([safetensors.view(files[name]) for name in numbered(leaf, index)])
            stacks = [_put(t, s, a, index, buffer) for t, s, a in zip(into, stacks, arrays, strict=True)]
        params.update(zip(leaf.paths, stacks, strict=True))
    if absent := sorted(set(specs) - set(params)):
        raise ValueError(f"the name table does not make {absent[:5]}")
    return unflatten({path: params[path] for path in specs})


def _buffer(leaves: list[Leaf], specs: Mapping[str, spec.Spec], vocab: int, files: Mapping) -> np.ndarray:
    """Host memory for the largest entry, used for every one: JAX frees what it was given when it pleases, not at once."""
    widest = max(t.dtype.itemsize for t in files.values())
    entries = (specs[p].shape[len(place(leaf, specs, vocab).lead) :] for leaf in leaves for p in leaf.paths)
    return np.empty(max(math.prod(shape) for shape in entries) * widest + ALIGN * jax.device_count(), np.uint8)


class _Target(NamedTuple):
    spec: spec.Spec
    sharding: Any
    dtype: Any
    lead: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape[self.lead :]

    @property
    def entry(self) -> Any:
        """The sharding of one entry of the stack."""
        if not isinstance(self.sharding, NamedSharding):
            return self.sharding
        return NamedSharding(self.sharding.mesh, PartitionSpec(*self.sharding.spec[self.lead :]))


def _zeros(t: _Target) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(t.spec.shape, t.dtype), out_shardings=t.sharding)()


def _put(t: _Target, stack: jax.Array, array: np.ndarray, index: tuple[int, ...], buffer: np.ndarray) -> jax.Array:
    """One entry to its devices and into its stack (or the whole leaf, where it has none)."""
    if array.dtype.kind not in "fV":  # V: ml_dtypes' bfloat16
        raise UserError(f"a weight of dtype {array.dtype}: floating point is needed")
    parts: dict[str, np.ndarray] = {}
    used = 0

    def part(where: tuple[slice, ...]) -> np.ndarray:
        nonlocal used
        if str(where) not in parts:
            shape = [b - a for a, b in _spans(where, t.shape)]
            size = math.prod(shape) * array.dtype.itemsize
            parts[str(where)] = buffer[used : used + size].view(array.dtype).reshape(shape)
            used += -(-size // ALIGN) * ALIGN
            _copy(array, t.shape, where, parts[str(where)])
        return parts[str(where)]

    entry = jax.make_array_from_callback(t.shape, t.entry, part)
    # what lies in the buffer has been used when the next entry overwrites it
    return _update(t.sharding)(stack, entry, jnp.asarray(index, jnp.int32)).block_until_ready()


def _spans(where: tuple[slice, ...], shape: tuple[int, ...]) -> list[tuple[int, int]]:
    return [s.indices(n)[:2] for s, n in zip(where, shape, strict=True)]


def _copy(array: np.ndarray, shape: tuple[int, ...], where: tuple[slice, ...], out: np.ndarray) -> None:
    """A part of `array`, grown with zeros to `shape` (the rows that pad a vocabulary), into `out`."""
    have = [(a, max(a, min(b, n))) for (a, b), n in zip(_spans(where, shape), array.shape, strict=True)]
    if any(n < m for n, m in zip(array.shape, shape, strict=True)):
        out[...] = 0
    out[tuple(slice(0, b - a) for a, b in have)] = array[tuple(slice(a, b) for a, b in have)]


@functools.lru_cache(256)
def _update(where: Any) -> Callable:
    def update(stack: jax.Array, entry: jax.Array, index: jax.Array) -> jax.Array:
        start = (*(index[j] for j in range(stack.ndim - entry.ndim)), *(0,) * entry.ndim)
        entry = entry.astype(stack.dtype).reshape((1,) * (stack.ndim - entry.ndim) + entry.shape)
        return jax.lax.dynamic_update_slice(stack, entry, start)

    return jax.jit(update, donate_argnums=0, out_shardings=where)
