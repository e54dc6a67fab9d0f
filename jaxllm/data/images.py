"""Images as sequences: read from files, coloured by a palette, unrolled in raster order behind a start token."""

from __future__ import annotations

import json
import os
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxllm.core.types import UserError
from jaxllm.data import tokenizer as tokenizers
from jaxllm.data.text import placed_rows

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")


class Images(NamedTuple):
    """pixels: uint8 [n, h, w, 3], or palette indices int [n, h, w]; labels int [n] or None; names of the labels."""

    pixels: np.ndarray
    labels: np.ndarray | None = None
    names: tuple[str, ...] = ()


# ---- reading


def read(path: str | Path, *, size: int = 32) -> Images:
    """Images of a file or directory.

    .npz with `images` and perhaps `labels`; .npy; .jsonl with rows of `pixels` (nested, or flat for square images) and perhaps
    `label`; a directory of pictures, or of one directory a class, each scaled to size x size. Arrays are [n, h, w, 3] in
    0..255, or integers [n, h, w]. Pickled arrays are refused. UserError names the file and what is wrong.
    """
    path = Path(os.path.expanduser(path))
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file or directory; give .npz, .npy, .jsonl or a directory of pictures")
    if path.is_dir():
        return _directory(path, size)
    if path.suffix in (".npz", ".npy"):
        return _arrays(path)
    if path.suffix in (".jsonl", ".json", ".gz"):
        return _rows(path)
    raise UserError(f"{path}: not images; give .npz, .npy, .jsonl or a directory of pictures")


def _arrays(path: Path) -> Images:
    try:
        found = np.load(path, allow_pickle=False)
        arrays = dict(found.items()) if path.suffix == ".npz" else {"images": found}
    except (ValueError, OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]}); pickled objects are refused") from None
    if "images" not in arrays:
        raise UserError(f"{path}: no array `images`; it has {', '.join(sorted(arrays)) or 'none'}")
    return check(Images(arrays["images"], arrays.get("labels")), str(path))


def _rows(path: Path) -> Images:
    pixels, labels = [], []
    for where, row in placed_rows(path):
        try:
            x = np.asarray(row["pixels"])
            side = int(round(x.size**0.5))
            x = x.reshape(side, side) if x.ndim == 1 else x
            pixels.append(x)
            labels.append(int(row.get("label", -1)))
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{where}: needs `pixels`, a square of integers, and perhaps an integer `label`") from None
        if x.shape != pixels[0].shape:
            raise UserError(f"{where}: {x.shape} pixels, the first row has {pixels[0].shape}: all images must have one size")
    return check(Images(np.stack(pixels), np.array(labels) if min(labels) >= 0 else None), str(path))


def _directory(path: Path, size: int) -> Images:
    classes = sorted(d for d in path.iterdir() if d.is_dir())
    files = [(f, k) for k, d in enumerate(classes or [path]) for f in sorted(d.iterdir()) if f.suffix.lower() in SUFFIXES]
    if not files:
        raise UserError(f"{path}: no pictures here; looked for {', '.join(SUFFIXES)}, also one directory deeper")
    try:
        from PIL import Image
    except ImportError:
        fix = 'pip install -e ".[plots]", or give .npz arrays'
        raise UserError(f"{path}: reading pictures needs the package pillow: {fix}") from None
    pixels = []
    for file, _ in files:
        try:
            with Image.open(file) as image:
                pixels.append(np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BOX)))
        except OSError as error:
            raise UserError(f"{file}: not a picture ({error})") from None
    labels = np.array([k for _, k in files]) if classes else None
    return check(Images(np.stack(pixels), labels, tuple(d.name for d in classes)), str(path))


def check(images: Images, where: str) -> Images:
    """The images, colours as uint8; UserError naming `where` when shapes, kinds or ranges are wrong."""
    x, y = images.pixels, images.labels
    if x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] != 3) or 0 in x.shape:
        raise UserError(f"{where}: images of shape {x.shape}; need [n, height, width, 3], or [n, height, width] palette indices")
    if not np.issubdtype(x.dtype, np.integer):
        raise UserError(f"{where}: images are {x.dtype}; need integers (colours from 0 to 255, or palette indices)")
    if x.min() < 0 or (x.ndim == 4 and x.max() > 255):
        raise UserError(f"{where}: values from {x.min()} to {x.max()}; colours are 0 to 255, palette indices not negative")
    if y is not None and (y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer) or y.min() < 0):
        raise UserError(f"{where}: labels {y.dtype} {y.shape}; need {x.shape[0]} integers from 0")
    return images._replace(pixels=x.astype(np.uint8) if x.ndim == 4 else x.astype(np.int32))


# ---- palettes


def kmeans(pixels: np.ndarray, colours: int, seed: int = 0, *, steps: int = 20, most: int = 50_000) -> np.ndarray:
    """A palette, uint8 [colours, 3], of pixels [..., 3] by k-means on at most `most` of them.

    ImageGPT's 9-bit colours are 512 of CIFAR's (Chen et al. 2020, "Generative pretraining from pixels", section 3.2). UserError
    when there are fewer distinct colours.
    """
    flat = pixels.reshape(-1, 3)
    distinct = np.unique(flat, axis=0)
    if len(distinct) < colours:
        raise UserError(f"the images have {len(distinct)} distinct colours, fewer than data.colours={colours}: lower it")
    rng = np.random.default_rng(seed)
    centres = distinct[rng.choice(len(distinct), colours, replace=False)].astype(np.float64)
    sample = flat[rng.permutation(len(flat))[:most]].astype(np.float64)
    for _ in range(steps):
        nearest = _nearest(sample, centres)
        count = np.bincount(nearest, minlength=colours)
        sums = np.stack([np.bincount(nearest, sample[:, c], colours) for c in range(3)], axis=-1)
        centres = np.where(count[:, None] > 0, sums / np.maximum(count, 1)[:, None], centres)
    return np.clip(np.rint(centres), 0, 255).astype(np.uint8)


def quantise(pixels: np.ndarray, palette: np.ndarray, *, rows: int = 256) -> np.ndarray:
    """The index of the nearest colour for every pixel: [n, h, w, 3] -> int32 [n, h, w]."""
    parts = [pixels[i : i + rows] for i in range(0, len(pixels), rows)]
    near = [_nearest(p.reshape(-1, 3).astype(np.float64), palette.astype(np.float64)).reshape(p.shape[:-1]) for p in parts]
    return np.concatenate(near).astype(np.int32)


def _nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    squares = (centres * centres).sum(-1)[None, :] - 2 * points @ centres.T  # without |point|^2, the same for all centres
    return squares.argmin(axis=1)


# ---- sequences


def records(indices: np.ndarray, colours: int) -> dict[str, np.ndarray]:
    """Sequence records of palette images [n, h, w]: tokens are the start token `colours` and all pixels but the last.

    Targets are the pixels in raster order, so a row has h * w positions and every one is trained.
    """
    targets = indices.reshape(len(indices), -1).astype(np.int32)
    start = np.full((len(targets), 1), colours, np.int32)
    return {
        "tokens": np.concatenate([start, targets[:, :-1]], axis=1), "targets": targets,
        "segments": np.ones_like(targets), "mask": np.ones(targets.shape, bool),
    }  # fmt: skip


def word_tokenizer(words: Sequence[str]) -> tokenizers.Tokenizer:
    """A tokenizer of white-space separated words, word i with id i, and `<|endoftext|>` after them as start, end and padding."""
    vocabulary = {word: i for i, word in enumerate([*words, "<|endoftext|>"])}
    special = {"id": len(words), "content": "<|endoftext|>", "special": True, "normalized": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    record = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [special | flags], "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<|unknown|>"},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(json.dumps(record), encoding="utf-8")
        return tokenizers.from_tokenizer_json(path)


# ---- pictures


def grid(images: np.ndarray, columns: int, *, gap: int = 2, scale: int = 6) -> np.ndarray:
    """Images uint8 [n, h, w, 3] side by side in rows of `columns`, each pixel scale x scale: uint8 [H, W, 3]."""
    n, h, w, _ = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        sheet[y : y + h, x : x + w] = image
    return sheet.repeat(scale, axis=0).repeat(scale, axis=1)


def png(image: np.ndarray) -> bytes:
    """uint8 [h, w, 3] as a PNG file."""
    h, w, _ = image.shape
    lines = np.concatenate([np.zeros((h, 1), np.uint8), image.reshape(h, w * 3)], axis=1)  # a line begins with its filter, 0

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body
