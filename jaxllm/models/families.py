"""Every kind of model by its name: what checkpoints, exports and tools say when they mean an architecture."""

from __future__ import annotations

import dataclasses
import importlib
import types
import typing
from collections.abc import Mapping
from typing import Any

from jaxllm.core.types import Model, UserError

# family -> (module, config class, function that makes the model)
FAMILIES = {
    "decoder": ("jaxllm.models.decoder", "DecoderConfig", "make"),
    "encoder": ("jaxllm.models.encoder", "EncoderConfig", "make"),
    "encdec": ("jaxllm.models.encdec", "EncDecConfig", "make"),
    "lstm": ("jaxllm.models.recurrent", "LSTMConfig", "make"),
    "elmo": ("jaxllm.models.recurrent", "BiLSTMConfig", "make_elmo"),
    "pooled": ("jaxllm.models.pooled", "PooledConfig", "make"),
    "flamingo": ("jaxllm.models.flamingo", "FlamingoConfig", "make"),
}


def to_dict(config: Any) -> dict[str, Any]:
    """A model's config as JSON values, with its family."""
    names = {name: family for family, (_, name, _) in FAMILIES.items()}
    if type(config).__name__ not in names:
        raise ValueError(f"{type(config).__name__} is no model's config: add it to models/families.py")
    return {"family": names[type(config).__name__], **dataclasses.asdict(config)}


def from_dict(record: dict[str, Any]) -> Any:
    """The config that `to_dict` wrote, also after JSON. Raises UserError on an unknown family or field."""
    family = record.get("family")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"model family {family!r}: choose one of {', '.join(FAMILIES)}")
    module, name, _ = FAMILIES[family]
    return build(getattr(importlib.import_module(module), name), {k: v for k, v in record.items() if k != "family"})


def make(config: Any) -> Model:
    """The model of any family's config."""
    module, _, function = FAMILIES[to_dict(config)["family"]]
    return getattr(importlib.import_module(module), function)(config)


def build(cls: Any, values: dict[str, Any]) -> Any:
    """A frozen record from plain values: nested records and tuples come back as what the fields are annotated with."""
    hints = typing.get_type_hints(cls)
    if unknown := sorted(set(values) - set(hints)):
        raise UserError(f"unknown model setting {unknown[0]!r}: the fields are {', '.join(hints)}")
    made = {name: _as(hints[name], value) for name, value in values.items()}
    for name, value in made.items():
        _check(hints[name], value, name)
    try:
        return cls(**made)
    except TypeError as error:  # a field without a default is missing
        raise UserError(f"incomplete model settings: {error}") from None


WIDER = {float: (int, float)}  # an int is a float too, as it comes out of JSON


def _check(hint: Any, value: Any, name: str) -> None:
    """UserError when a field holds another kind than it is annotated with."""
    if not any(_is(option, value) for option in _options(hint)):
        kinds = " or ".join(getattr(option, "__name__", str(option)) for option in _options(hint))
        raise UserError(f"model setting {name}={str(value)[:40]!r}: expected {kinds}")


def _is(kind: Any, value: Any) -> bool:
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is(typing.get_args(kind)[0], part) for part in value)
    kind = typing.get_origin(kind) or kind
    return isinstance(value, WIDER.get(kind, kind)) and (kind is bool or not isinstance(value, bool))


def _options(hint: Any) -> tuple:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union else (hint,)


def _as(hint: Any, value: Any) -> Any:
    for option in _options(hint):
        if dataclasses.is_dataclass(option) and isinstance(value, Mapping):
            return build(option, dict(value))
        if typing.get_origin(option) is tuple and isinstance(value, list | tuple):
            return tuple(value)
    return value
