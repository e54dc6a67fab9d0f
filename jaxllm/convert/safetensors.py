"""The safetensors format, read with suspicion and written in order.

A file is 8 bytes (little-endian length of the header), the header (JSON: name -> dtype, shape, data_offsets) and the data.
Everything that a hostile or broken file may say is checked before any of its data is touched; nothing here unpickles.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxllm.core.types import UserError

MAX_HEADER = 100_000_000  # bytes, as the format's own library; an index may be as long
DIMENSIONS = 32  # of a tensor
SHARD = re.compile(r"[A-Za-z0-9._-]+\.safetensors")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".h5", ".msgpack")
DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Tensor(NamedTuple):
    """Where a tensor's bytes are: begin counts from the start of the file."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int


def inside(directory: Path, name: str) -> Path:
    """The real path of a file of a directory. UserError when a symbolic link leads out of it, and on pipes and devices.

    A snapshot of the hub's cache links to the blobs beside it: there the repository's folder is the border.
    """
    border = directory.resolve()
    if border.parent.name == "snapshots" and (border.parent.parent / "blobs").is_dir():
        border = border.parent.parent
    real = (directory / name).resolve()
    if not real.is_relative_to(border):
        raise UserError(f"{directory / name}: leads out of the directory to {real}: put the file itself there")
    if real.exists() and not real.is_file() and not real.is_dir():  # opening a pipe waits for a writer
        raise UserError(f"{directory / name}: is no plain file: put the file itself there")
    return real


def read_json(directory: Path, name: str) -> dict:
    """A JSON object of a directory. UserError when it is too long, no JSON, or no object."""
    real = inside(directory, name)
    try:
        if real.stat().st_size > MAX_HEADER:
            raise UserError(f"{directory / name}: over {MAX_HEADER // 10**6} MB, too long for a {name}")
        return parse_json(real.read_bytes(), directory / name)
    except OSError as error:
        raise UserError(f"{directory / name}: cannot be read ({error.strerror})") from None


def parse_json(content: bytes, where: Any) -> dict:
    """A JSON object without repeated keys. UserError naming `where`."""

    def once(pairs: list[tuple[str, Any]]) -> dict:
        record = dict(pairs)
        if len(record) < len(pairs):
            seen: set[str] = set()
            again = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise ValueError(f"{again[:100]!r} stands twice")
        return record

    try:
        record = json.loads(content, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({str(error)[:100]})") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: a JSON object was expected, found {type(record).__name__}")
    return record


def scan(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a directory: name -> where. UserError on whatever the files should not say.

    model.safetensors.index.json names the shards; else model.safetensors; else the one *.safetensors that is there.
    """
    found: dict[str, Tensor] = {}
    for shard in _shards(directory):
        for name, tensor in read_header(inside(directory, shard)).items():
            if name in found:
                raise UserError(f"{directory}: tensor {name!r} stands in {found[name].file.name} and in {shard}")
            found[name] = tensor
    return found


def _shards(directory: Path) -> list[str]:
    index = "model.safetensors.index.json"
    if (directory / index).exists():
        weight_map = read_json(directory, index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{directory / index}: no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if not SHARD.fullmatch(name):
                raise UserError(f"{directory / index}: {name[:100]!r} is no name of a shard: letters, digits and ._- only")
            if not inside(directory, name).is_file():
                raise UserError(f"{directory / index}: names the shard {name}, which is not there: fetch it again")
        return names
    files = sorted(p.name for p in directory.glob("*.safetensors"))
    if "model.safetensors" in files or len(files) == 1:
        return ["model.safetensors"] if "model.safetensors" in files else files
    if files:
        raise UserError(f"{directory}: {len(files)} .safetensors files and no {index} that joins them: fetch it too")
    raise UserError(_no_weights(directory))


def _no_weights(directory: Path) -> str:
    pickled = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLED)
    if not pickled:
        return f"{directory}: no model.safetensors and no model.safetensors.index.json"
    return (
        f"{directory}: {pickled[0]} may run code when it is opened and is never read here: get the safetensors of this model, "
        "or convert it where you trust it: transformers' AutoModel.from_pretrained(...).save_pretrained(...)"
    )


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of one file. UserError when length, header, dtypes, shapes or offsets are not what the format allows."""
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > size - 8:
                raise UserError(f"{file}: {size} bytes, its header alone claims {length}: truncated, or not safetensors")
            if length > MAX_HEADER:
                raise UserError(f"{file}: a header of {length} bytes is over {MAX_HEADER // 10**6} MB: refused")
            record = parse_json(f.read(length), f"{file}: header")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    record.pop("__metadata__", None)
    data = size - 8 - length
    spans = [(*_span(file, name, entry, data), name, entry) for name, entry in record.items()]
    at = 0
    for begin, end, name, _ in sorted(spans, key=lambda s: s[:2]):
        if begin != at:
            what = "overlaps the one before it" if begin < at else f"leaves {begin - at} bytes that belong to none"
            raise UserError(f"{file}: tensor {name!r} at offset {begin} {what}: refused")
        at = end
    if at != data:
        raise UserError(f"{file}: {data} bytes of data, its tensors take {at}: truncated or padded: refused")
    return {n: Tensor(file, DTYPES[e["dtype"]], tuple(e["shape"]), 8 + length + begin) for begin, _, n, e in spans}


def _span(file: Path, name: str, entry: Any, data: int) -> tuple[int, int]:
    """A tensor's checked (begin, end) in the data."""
    where = f"{file}: tensor {name[:100]!r}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise UserError(f"{where} needs dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(
            f"{where} has dtype {str(dtype)[:40]!r}: only {', '.join(DTYPES)} are read (quantised weights: convert first)"
        )
    if not _naturals(shape) or len(shape) > DIMENSIONS or not _naturals(offsets) or len(offsets) != 2:
        raise UserError(f"{where} has shape {str(shape)[:60]} and data_offsets {str(offsets)[:60]}: natural numbers are needed")
    begin, end = offsets
    need = math.prod(shape) * DTYPES[dtype].itemsize
    if not 0 <= begin <= end <= data:
        raise UserError(f"{where} claims bytes {begin} to {end} of {data}: outside the file: truncated or hostile")
    if end - begin != need:
        raise UserError(f"{where} of {dtype} {tuple(shape)} takes {need} bytes, its offsets give {end - begin}")
    return begin, end


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**63 for v in values)


def view(tensor: Tensor) -> np.ndarray:
    """A read-only view of the file: bytes come from the disk when they are used, none are held."""
    if math.prod(tensor.shape) == 0:
        return np.zeros(tensor.shape, tensor.dtype)
    raw = np.memmap(tensor.file, np.uint8, "r", tensor.begin, math.prod(tensor.shape) * tensor.dtype.itemsize)
    return np.asarray(raw).view(tensor.dtype).reshape(tensor.shape)


def write(file: Path, planned: Sequence[tuple[str, np.dtype, tuple[int, ...]]], arrays: Iterable[np.ndarray]) -> None:
    """One file of the planned tensors, `arrays` in the same order, one held at a time; on disk when this returns."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers reads only files that say so
    at = 0
    for name, dtype, shape in planned:
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for (name, dtype, shape), array in zip(planned, arrays, strict=True):
            if array.dtype != dtype or array.shape != shape:
                raise ValueError(f"{name}: planned {dtype} {shape}, got {array.dtype} {array.shape}")
            f.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        f.flush()
        os.fsync(f.fileno())
