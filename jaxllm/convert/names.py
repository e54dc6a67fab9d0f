"""Name tables: which published tensors make which of our leaves, both ways.

A family is a config mapping and a table of `Leaf`s. One entry serves every layer of a stack: "{i}" in a published name counts
along the first axis of our leaf, "{e}" (experts) along the next, and `read` and `write` see one layer's (one expert's) arrays:

    def leaves(c):  # c: our config
        h = (c.n_heads, c.dim_head)
        return [
            embedding("embed/tokens", "model.embed_tokens"),
            *norm("layers/attention_norm", "model.layers.{i}.input_layernorm"),
            *linear("layers/attention/q", "model.layers.{i}.self_attn.q_proj", out=h, bias=c.bias),
            *linear("layers/attention/o", "model.layers.{i}.self_attn.o_proj", inp=h),
        ]

Shapes are not repeated here: they follow from the specs of the model, and a spec's axis `vocab` has the published length on
disk, the padded one in memory. `hf.load` and `hf.save` do the rest: what is missing, unknown or misshapen is found by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from jaxllm.core.types import UserError

Arrays = list[np.ndarray]
LARGEST = 20_000_000  # no published size is above it, and what is made of one stays in memory


class Leaf(NamedTuple):
    """paths: our leaves, mostly one ("layers/attention/q/kernel"); names: the published tensors that make them.

    read: [a tensor per name] -> [an array per path]; write: the inverse, exactly. Both should give views where they can.
    start: the "{i}" of a stack's first layer. rows: the length on disk of an axis `vocab`, where it is not config.vocab_size.
    float32: the tensor is saved in float32 whatever the others are.
    """

    paths: tuple[str, ...]
    names: tuple[str, ...]
    read: Callable[[Arrays], Arrays]
    write: Callable[[Arrays], Arrays]
    start: int = 0
    rows: int | None = None
    float32: bool = False


class Family(NamedTuple):
    """architecture, model_type: as in config.json ("LlamaForCausalLM", "llama"). record: the class of our config.

    config: config.json -> our config, UserError naming key and value of what is not supported; to_config: the inverse (UserError
    when this family cannot hold the config). leaves: our config -> the table. ignored: regular expression (fullmatch) of names
    that may stand in files and are not needed. renames: (pattern, replacement) applied to the names in files, one after another,
    for files of older spellings. adjust: (our config, the names in the files) -> our config, where the files decide.
    """

    architecture: str
    model_type: str
    record: type
    config: Callable[[dict], Any]
    to_config: Callable[[Any], dict]
    leaves: Callable[[Any], list[Leaf]]
    ignored: str = r"(?!)"
    renames: tuple[tuple[str, str], ...] = ()
    adjust: Callable[[Any, Iterable[str]], Any] = lambda config, names: config


# ---- constructors: each returns a list of leaves, but `leaf` and `embedding`, which return one


def leaf(path: str, name: str, read: Callable = np.asarray, write: Callable = np.asarray, **more: Any) -> Leaf:
    """One of our leaves from one tensor by array functions; without them the values as they are."""
    return Leaf((path,), (name,), lambda t: [read(t[0])], lambda a: [write(a[0])], **more)


def vector(path: str, name: str, shape: tuple[int, ...] | None = None, **more: Any) -> list[Leaf]:
    """A bias or the like, [n] on disk and `shape` here (default: the same)."""
    if shape is None:
        return [leaf(path, name, **more)]
    return [leaf(path, name, lambda t: t.reshape(shape), lambda a: a.reshape(-1), **more)]


def embedding(path: str, name: str, **more: Any) -> Leaf:
    """A table of rows [v, d], `name`.weight on disk."""
    return leaf(path, f"{name}.weight", **more)


def norm(path: str, name: str, *, bias: bool = False, offset: bool = False, **more: Any) -> list[Leaf]:
    """`name`.weight is path/scale (with `offset`, path/offset: Gemma's 1 + w); with `bias`, `name`.bias is path/bias."""
    scale = [leaf(f"{path}/{'offset' if offset else 'scale'}", f"{name}.weight", **more)]
    return scale + ([leaf(f"{path}/bias", f"{name}.bias", **more)] if bias else [])


def linear(
    path: str, name: str, *, inp: tuple[int, ...] = (), out: tuple[int, ...] = (), bias: bool = False, **more: Any
) -> list[Leaf]:
    """torch's Linear, weight [out, in] on disk, as path/kernel [*inp, *out]; give inp or out where ours has several axes.

    bias: also `name`.bias as path/bias [*out].
    """

    kernel = leaf(
        f"{path}/kernel", f"{name}.weight", lambda t: _split(t.T, inp, out), lambda a: _flat(a, len(inp) or 1).T, **more
    )
    return [kernel] + (vector(f"{path}/bias", f"{name}.bias", out or None, **more) if bias else [])


def conv1d(
    path: str, name: str, *, inp: tuple[int, ...] = (), out: tuple[int, ...] = (), bias: bool = True, **more: Any
) -> list[Leaf]:
    """GPT-2's Conv1D, weight [in, out] on disk, as path/kernel [*inp, *out], and its bias."""
    kernel = leaf(f"{path}/kernel", f"{name}.weight", lambda t: _split(t, inp, out), lambda a: _flat(a, len(inp) or 1), **more)
    return [kernel] + (vector(f"{path}/bias", f"{name}.bias", out or None, **more) if bias else [])


def fused(paths: tuple[str, ...], name: str, *, outs: tuple[tuple[int, ...], ...], transpose: bool, bias: bool) -> list[Leaf]:
    """Several kernels [d, *outs[j]] in one published weight, side by side along its output axis.

    transpose: the weight is torch's Linear [sum of outs, d], else GPT-2's Conv1D [d, sum of outs]. paths: without /kernel.
    """
    sizes = [math.prod(out) for out in outs]
    cuts = np.cumsum(sizes)[:-1].tolist()

    def read(t: Arrays) -> Arrays:
        parts = np.split(t[0].T if transpose else t[0], cuts, axis=1)
        return [_split(part, (), out) for part, out in zip(parts, outs, strict=True)]

    def write(a: Arrays) -> Arrays:
        whole = np.concatenate([_flat(x, 1) for x in a], axis=1)
        return [whole.T if transpose else whole]

    def read_bias(t: Arrays) -> Arrays:
        return [part.reshape(out) for part, out in zip(np.split(t[0], cuts), outs, strict=True)]

    def write_bias(a: Arrays) -> Arrays:
        return [np.concatenate([x.reshape(-1) for x in a])]

    kernel = Leaf(tuple(f"{p}/kernel" for p in paths), (f"{name}.weight",), read, write)
    both = [kernel, Leaf(tuple(f"{p}/bias" for p in paths), (f"{name}.bias",), read_bias, write_bias)]
    return both if bias else [kernel]


def _split(matrix: np.ndarray, inp: tuple[int, ...], out: tuple[int, ...]) -> np.ndarray:
    """[in, out] -> [*inp, *out]; a view, of a transposed matrix too."""
    return matrix.reshape(*(inp or matrix.shape[:1]), *(out or matrix.shape[1:]))


def _flat(array: np.ndarray, inputs: int) -> np.ndarray:
    """[*inp, *out] -> [in, out]: the first `inputs` axes are one side."""
    return array.reshape(math.prod(array.shape[:inputs]), -1)


# ---- reading config.json


def need(config: dict, key: str, kind: type = int) -> Any:
    """A key that must be there. UserError when it is missing or of another type."""
    value = config.get(key)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        found = "is missing" if key not in config else f"is {value!r}"
        raise UserError(f"config.json: {key} {found}, a {kind.__name__} is needed")
    if kind is int and not 0 <= value <= LARGEST:
        raise UserError(f"config.json: {key}={value} is out of range: 0 to {LARGEST}")
    return value


def only(config: dict, **supported: Any) -> None:
    """UserError when a key has a value other than the one given (or one of a tuple of them); a missing key is fine."""
    for key, allowed in supported.items():
        choices = allowed if isinstance(allowed, tuple) else (allowed,)
        if key in config and config[key] not in choices:
            raise UserError(f"config.json: {key}={config[key]!r} is not supported: only {' or '.join(map(repr, choices))} is")


def choose(config: dict, key: str, table: dict[str, str], default: str | None = None) -> str:
    """Our word for a key's value. UserError with the values that are known."""
    value = config.get(key, default)
    if value not in table:
        raise UserError(f"config.json: {key}={value!r} is not supported: it may be {', '.join(table)}")
    return table[value]
