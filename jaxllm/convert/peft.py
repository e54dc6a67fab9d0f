"""Low-rank adapters in PEFT's file format, both ways: adapter_config.json and adapter_model.safetensors.

What makes a published weight of our kernels is in the families' name tables; an adapter of a kernel [in, out] follows its order
of inputs and outputs. PEFT has lora_A [r, in] and lora_B [out, r], for torch's Linear and GPT-2's Conv1D alike. Where a published
weight is made of several of our kernels (GPT-2's c_attn of q, k and v), their adapters stand in one of as many times the rank,
and come apart again when they are read.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxllm.convert import export, safetensors
from jaxllm.convert.layout import numbered, place
from jaxllm.convert.names import Leaf
from jaxllm.core.tree import flatten, unflatten
from jaxllm.core.types import Model, UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SCALES = {"standard": lambda alpha, rank: alpha / rank, "rslora": lambda alpha, rank: alpha / math.sqrt(rank)}
TASKS = (
    ("ForCausalLM", "CAUSAL_LM"), ("LMHeadModel", "CAUSAL_LM"), ("ForConditionalGeneration", "SEQ_2_SEQ_LM"),
    ("ForSequenceClassification", "SEQ_CLS"), ("ForTokenClassification", "TOKEN_CLS"),
)  # fmt: skip


class Module(NamedTuple):
    """A published weight that is made of kernels: its leaf of the table, stack sizes, shapes of the kernels, and the order.

    rows, columns: for each published output and input, the number of ours, outputs counted over all kernels; linear: the weight
    is [out, in], else Conv1D's [in, out].
    """

    leaf: Leaf
    lead: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    rows: np.ndarray
    columns: np.ndarray
    linear: bool

    @property
    def name(self) -> str:
        """The module, "{i}" for the layer."""
        return self.leaf.names[0].removesuffix(".weight")

    @property
    def suffix(self) -> str:
        """Its name within a layer."""
        return self.name.rpartition("{i}.")[2]

    @property
    def outputs(self) -> list[slice]:
        """Where each kernel's outputs are."""
        sizes = [math.prod(shape) // len(self.columns) for shape in self.shapes]
        ends = list(itertools.accumulate(sizes))
        return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


# ---- writing


def save(
    path: str | Path, model: Model, adapters: Any, *, alpha: float, scaling: str = "standard", architecture: str | None = None,
    base: str = "", card: Callable[[str, int], str] | None = None,
) -> str:  # fmt: skip
    """Write adapters {path of a kernel: {a, b}} of a model as a directory that PEFT loads; the architecture that they are for.

    alpha, scaling (standard | rslora): of the adapters; base: the published model's name or directory, for the reader; card:
    README.md, from the architecture and how many numbers are written.
    UserError: the target has content, no published architecture holds the model, or none of its modules an adapter (experts).
    """
    target = Path(os.path.expanduser(path)).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{path}: is there and not empty: export to a new directory, or remove it first")
    family = export._holds(model.config, architecture)
    pairs = _pairs(adapters)
    table = _modules(family.leaves(model.config), model)
    used = [m for m in table if set(m.leaf.paths) & pairs.keys()]
    if absent := sorted(set(pairs) - {p for m in used for p in m.leaf.paths}):
        raise UserError(f"PEFT's format has no place for adapters on {', '.join(absent[:5])}: merge them and export the model")
    rank = next(iter(pairs.values()))["a"].shape[-1]
    tensors = {name: x for m in used for name, x in _published(m, pairs)}
    part = export._part_directory(target)
    try:
        planned = [(name, np.dtype(np.float32), x.shape) for name, x in tensors.items()]
        safetensors.write(part / WEIGHTS, planned, tensors.values())
        record = _config(family.architecture, table, used, pairs, rank, alpha, scaling, base)
        export._write_json(part / CONFIG, record)
        if card is not None:
            text = card(family.architecture, sum(x.size for x in tensors.values()))
            (part / "README.md").write_text(text, encoding="utf-8")
        os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return family.architecture


def _pairs(adapters: Any) -> dict[str, dict[str, np.ndarray]]:
    """{path of a kernel: {a, b}} in float32."""
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for path, x in flatten(adapters).items():
        kernel, _, name = path.rpartition("/")
        pairs.setdefault(kernel, {})[name] = np.asarray(x, np.float32)
    return pairs


def _modules(leaves: list[Leaf], model: Model) -> list[Module]:
    """Every weight of the table that is made of kernels and can have an adapter."""
    specs, found = flatten(model.specs), []
    for leaf in leaves:
        kernels = len(leaf.names) == 1 and leaf.names[0].endswith(".weight") and "{e}" not in leaf.names[0]
        if kernels and all(p.endswith("/kernel") for p in leaf.paths):
            where = place(leaf, specs, model.config.vocab_size)
            if (order := _order(leaf, where.shapes)) is not None:
                found.append(Module(leaf, where.lead, where.shapes, *order))
    return found


def _order(leaf: Leaf, shapes: tuple[tuple[int, ...], ...]) -> tuple[np.ndarray, np.ndarray, bool] | None:
    """(rows, columns, linear) of a weight, found by writing the numbers of inputs and outputs in the place of the kernels."""
    for n in range(1, max(map(len, shapes))):  # how many axes are inputs
        inputs = [math.prod(shape[:n]) for shape in shapes]
        ends = list(itertools.accumulate(math.prod(shape[n:]) for shape in shapes))
        starts = [0, *ends[:-1]]
        ins = [np.arange(i).reshape(*s[:n], *(1,) * (len(s) - n)) for i, s in zip(inputs, shapes, strict=True)]
        outs = [np.arange(a, b).reshape(*(1,) * n, *s[n:]) for a, b, s in zip(starts, ends, shapes, strict=True)]
        try:
            w_in, w_out = (leaf.write([np.broadcast_to(x, s) for x, s in zip(xs, shapes, strict=True)])[0] for xs in (ins, outs))
        except ValueError:
            continue
        for linear in (True, False):
            rows, columns = (w_out, w_in) if linear else (w_out.T, w_in.T)
            if rows.shape == (ends[-1], inputs[0]) and _constant(rows) and _constant(columns.T):
                order = rows[:, 0], columns[0]
                if all(np.array_equal(np.sort(x), np.arange(len(x))) for x in order):
                    return (*order, linear)
    return None


def _constant(matrix: np.ndarray) -> bool:
    """Whether each row is one number: looked up in a few columns."""
    return all(np.array_equal(matrix[:, 0], matrix[:, j]) for j in {1 % matrix.shape[1], matrix.shape[1] // 2, -1})


def _published(m: Module, pairs: Mapping[str, dict[str, np.ndarray]]):
    """(name, tensor) of a module's adapters, layer by layer."""
    have = [(pairs[p], where, shape) for p, where, shape in zip(m.leaf.paths, m.outputs, m.shapes, strict=True) if p in pairs]
    for index in itertools.product(*map(range, m.lead)):
        low, high = [], []
        for pair, where, shape in have:
            a, b = pair["a"][index], pair["b"][index]
            rank = a.shape[-1]
            outs = shape[a.ndim - 1 :]
            b = b[(slice(None), *(slice(0, n) for n in outs))]  # without the rows that pad a vocabulary
            block = np.zeros((len(m.rows), rank), np.float32)
            block[where] = b.reshape(rank, -1).T
            low.append(a.reshape(-1, rank).T[:, m.columns])
            high.append(block[m.rows])
        name = PREFIX + numbered(m.leaf, index)[0].removesuffix(".weight")
        yield f"{name}.lora_A.weight", np.concatenate(low)
        yield f"{name}.lora_B.weight", np.concatenate(high, axis=1)


def _config(
    architecture: str, table: list[Module], used: list[Module], pairs: Mapping, rank: int, alpha: float, scaling: str, base: str
) -> dict[str, Any]:
    """adapter_config.json."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    targets: set[str] = set()
    for m in used:
        n = sum(p in pairs for p in m.leaf.paths)
        everywhere = all(set(other.leaf.paths) & pairs.keys() for other in table if other.suffix == m.suffix)
        layers = [numbered(m.leaf, i)[0].removesuffix(".weight") for i in itertools.product(*map(range, m.lead))]
        targets |= {m.suffix} if everywhere else set(layers)
        if n > 1:
            scale = SCALES[scaling]
            ranks[m.suffix], alphas[m.suffix] = n * rank, alpha * scale(1.0, rank) / scale(1.0, n * rank)
    whole = lambda x: int(x) if float(x).is_integer() else float(x)  # noqa: E731
    return {
        "peft_type": "LORA", "task_type": next((task for end, task in TASKS if architecture.endswith(end)), None),
        "base_model_name_or_path": base or None, "r": rank, "lora_alpha": whole(alpha), "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted(targets), "rank_pattern": ranks, "alpha_pattern": {k: whole(v) for k, v in alphas.items()},
        "fan_in_fan_out": not all(m.linear for m in used), "use_rslora": scaling == "rslora", "use_dora": False,
        "init_lora_weights": True, "inference_mode": True, "modules_to_save": None,
    }  # fmt: skip


# ---- reading


class Read(NamedTuple):
    """adapters {path of a kernel: {a, b}} as a tree; settings: rank, alpha, match and scaling, as configs have them."""

    adapters: Any
    settings: dict[str, Any]


def load(path: str | Path, model: Model, architecture: str | None = None) -> Read:
    """What PEFT saved for a model, in float32. Ranks that differ are filled up with zeros, layers without an adapter too.

    UserError: no adapter of PEFT, another method (DoRA, biases, embeddings), or modules that the model does not have.
    """
    directory = Path(os.path.expanduser(path))
    if not (directory / CONFIG).exists():
        raise UserError(f"{path}: no {CONFIG}: give the directory of an adapter that PEFT saved")
    config = safetensors.read_json(directory, CONFIG)
    _supported(config, directory)
    files = safetensors.scan(directory)
    table = _modules(export._holds(model.config, architecture).leaves(model.config), model)
    scaling = "rslora" if config.get("use_rslora") else "standard"
    parts: dict[str, dict[tuple[int, ...], tuple]] = {}
    lead: dict[str, tuple[int, ...]] = {}
    patterns, default = _alphas(config, directory)
    for m, index, *both in _found(files, table, directory):
        a, b = (np.asarray(safetensors.view(t), np.float32) for t in both)
        name = numbered(m.leaf, index)[0].removesuffix(".weight")
        alpha = next((value for pattern, value in patterns if pattern.fullmatch(name)), default)
        scale = SCALES[scaling](alpha, a.shape[0])
        for p, x in _ours(m, a, b, scale, directory).items():
            parts.setdefault(p, {})[index], lead[p] = x, m.lead
    scales = [x[2] for layers in parts.values() for x in layers.values()]
    one = max(set(scales), key=scales.count)
    rank = max(x[0].shape[1] for layers in parts.values() for x in layers.values())
    specs = flatten(model.specs)
    adapters = {p: _stacked(parts[p], lead[p], specs[p].shape[len(lead[p]) :], rank, one) for p in parts}
    alpha = one / SCALES[scaling](1.0, rank)
    match = f"^({'|'.join(map(re.escape, sorted(adapters)))})$"
    return Read(unflatten(adapters), {"rank": rank, "alpha": alpha, "match": match, "scaling": scaling})


def _supported(config: dict, where: Path) -> None:
    only = {"peft_type": ("LORA",), "bias": ("none", None), "use_dora": (False, None), "modules_to_save": (None, [])}
    for key, values in only.items():
        if (value := config.get(key)) not in values:
            raise UserError(f"{where / CONFIG}: {key}={value!r} is not supported: only {values[0]!r} is")


def _alphas(config: dict, where: Path) -> tuple[list[tuple[re.Pattern, float]], float]:
    """(alpha_pattern as patterns with their alphas, lora_alpha). UserError: patterns that could match without end, no numbers."""
    patterns, default = config.get("alpha_pattern") or {}, config.get("lora_alpha", 8)
    given = patterns.items() if isinstance(patterns, dict) else [("alpha_pattern", patterns)]
    for name, value in [("lora_alpha", default), *given]:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
            raise UserError(f"{where / CONFIG}: {name[:60]}: {str(value)[:40]!r} is no alpha: positive numbers are")
        # without groups, and with few repetitions, no pattern takes long
        if len(name) > 200 or re.search(r"[^\w.|^$\\*+-]", name) or len(re.findall(r"[*+]", name)) > 3:
            raise UserError(f"{where / CONFIG}: alpha_pattern {name[:60]!r}: give names of modules, with at most three * or +")
    try:
        return [(re.compile(rf"(.*\.)?({name})"), float(value)) for name, value in patterns.items()], float(default)
    except re.error as error:
        raise UserError(f"{where / CONFIG}: alpha_pattern is no pattern ({error}): give names of modules") from None


def _found(files: Mapping, table: list[Module], where: Path) -> list[tuple]:
    """(module, index, lora_A, lora_B) of each entry. UserError with the names that belong to none."""
    names = {}
    for k, m in enumerate(table):
        for index in itertools.product(*map(range, m.lead)):
            names[numbered(m.leaf, index)[0].removesuffix(".weight")] = (k, index)
    sides: dict[tuple, dict[str, Any]] = {}
    unknown = []
    for name, tensor in files.items():
        if name.endswith(".base_layer.weight"):  # a head's own weights, which PEFT saves beside its adapter
            continue
        match = re.fullmatch(rf"(?:{re.escape(PREFIX)})?(.+)\.lora_(A|B)(?:\.default)?\.weight", name)
        if match is None or match[1] not in names:
            unknown.append(name)
        else:
            sides.setdefault(names[match[1]], {})[match[2]] = tensor
    unknown += [f"a half of {table[k].name}" for (k, _), side in sides.items() if len(side) < 2]
    if unknown or not sides:
        raise UserError(f"{where}: not adapters of this model's modules: {'; '.join(unknown[:5]) or 'none are there'}")
    return [(table[k], index, side["A"], side["B"]) for (k, index), side in sorted(sides.items(), key=lambda x: x[0])]


def _ours(m: Module, low: np.ndarray, high: np.ndarray, scale: float, where: Path) -> dict[str, tuple]:
    """{path: (a [in, r], b [r, out], scale)} of one entry of a module."""
    if low.ndim != 2 or low.shape[1] != len(m.columns) or high.shape != (len(m.rows), low.shape[0]):
        want = f"[r, {len(m.columns)}] and [{len(m.rows)}, r]"
        raise UserError(f"{where}: {m.name} has lora_A {low.shape} and lora_B {high.shape}, the model needs {want}")
    a, b = np.empty_like(low), np.empty_like(high)
    a[:, m.columns], b[m.rows] = low, high
    out = {}
    for path, rows in zip(m.leaf.paths, m.outputs, strict=True):
        mine = b[rows]
        # of what stands for several kernels, the part of this one; where all of b is 0 the adapter is fresh, and a its start
        used = (mine != 0).any(axis=0) if len(m.leaf.paths) > 1 and b.any() else np.ones(len(a), bool)
        if used.any():
            out[path] = (a[used].T, mine[:, used].T, scale)
    return out


def _stacked(layers: Mapping, lead: tuple[int, ...], shape: tuple[int, ...], rank: int, scale: float) -> dict[str, np.ndarray]:
    """a [*lead, *inputs, rank] and b [*lead, rank, *outputs] of a kernel of `shape`, all with one scale."""
    size = next(iter(layers.values()))[0].shape[0]
    cut = next(n for n in range(1, len(shape)) if math.prod(shape[:n]) == size)
    a = np.zeros((*lead, size, rank), np.float32)
    b = np.zeros((*lead, rank, math.prod(shape[cut:])), np.float32)
    for index, (low, high, its) in layers.items():
        n, outs = high.shape
        a[(*index, slice(None), slice(0, n))] = low
        b[(*index, slice(0, n), slice(0, outs))] = high * (its / scale)
    return {"a": a.reshape(*lead, *shape[:cut], rank), "b": b.reshape(*lead, rank, *shape[cut:])}
