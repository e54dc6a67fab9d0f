"""Images from files to palettes to sequences, and back to pictures."""

import json
import struct
import zlib

import numpy as np
import pytest

from jaxllm.core.types import UserError
from jaxllm.data import images
from jaxllm.data import tokenizer as tokenizers

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 4, 5, 3)).astype(np.uint8)
INDICES = RNG.integers(0, 7, (6, 4, 4))
LABELS = np.array([0, 1, 2, 0, 1, 2])


def test_arrays_are_read_with_and_without_labels(tmp_path):
    np.savez(tmp_path / "a.npz", images=RGB, labels=LABELS)
    found = images.read(tmp_path / "a.npz")
    np.testing.assert_array_equal(found.pixels, RGB)
    np.testing.assert_array_equal(found.labels, LABELS)
    np.save(tmp_path / "b.npy", INDICES)
    found = images.read(tmp_path / "b.npy")
    np.testing.assert_array_equal(found.pixels, INDICES)
    assert found.labels is None and found.pixels.dtype == np.int32


def test_rows_are_read_nested_and_flat(tmp_path):
    rows = [{"pixels": x.tolist() if i % 2 else x.reshape(-1).tolist(), "label": i % 3} for i, x in enumerate(INDICES)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = images.read(path)
    np.testing.assert_array_equal(found.pixels, INDICES)
    np.testing.assert_array_equal(found.labels, np.arange(6) % 3)


def test_directories_of_pictures_are_read_by_class(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for k, name in enumerate(("cats", "dogs")):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.fromarray(RGB[2 * k + i, :, :4].repeat(2, 0).repeat(2, 1)).save(tmp_path / name / f"{i}.png")
    found = images.read(tmp_path, size=4)
    assert found.pixels.shape == (4, 4, 4, 3) and found.names == ("cats", "dogs")
    np.testing.assert_array_equal(found.labels, [0, 0, 1, 1])
    np.testing.assert_array_equal(found.pixels, RGB[:4, :, :4])  # four pixels become their mean


def write(tmp_path, name, **arrays):
    np.savez(tmp_path / name, **arrays)
    return tmp_path / name


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda p: p / "nowhere.npz", "nowhere.npz: no such file"),
        (lambda p: write(p, "x.npz", images=np.array([{}, {}], dtype=object)), "x.npz.*pickled"),
        (lambda p: write(p, "x.npz", data=RGB), "no array `images`; it has data"),
        (lambda p: write(p, "x.npz", images=RGB.astype(np.float32)), "float32; need integers"),
        (lambda p: write(p, "x.npz", images=RGB[..., :2]), r"shape \(6, 4, 5, 2\)"),
        (lambda p: write(p, "x.npz", images=RGB.astype(np.int32) + 200), "colours are 0 to 255"),
        (lambda p: write(p, "x.npz", images=INDICES - 1), "not negative"),
        (lambda p: write(p, "x.npz", images=RGB, labels=LABELS[:3]), "labels .*need 6 integers"),
        (lambda p: p, "no pictures here"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, make, match):
    with pytest.raises(UserError, match=match):
        images.read(make(tmp_path))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"pixels": [1, 2, 3]}\n', ":1: needs `pixels`, a square"),
        ('{"label": 1}\n', ":1: needs `pixels`"),
        ('{"pixels": [1, 2, 3, 4]}\n{"pixels": [1]}\n', r":2: \(1, 1\) pixels, the first row has \(2, 2\)"),
        ("no json\n", r"rows\.jsonl:1"),
    ],
)
def test_rows_that_are_no_images_are_named(tmp_path, text, match):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(UserError, match=match):
        images.read(tmp_path / "rows.jsonl")


def test_a_truncated_file_and_a_strange_one_are_refused(tmp_path):
    whole = write(tmp_path, "a.npz", images=RGB).read_bytes()
    (tmp_path / "b.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.bin").write_bytes(b"x")
    for name in ("b.npz", "c.bin"):
        with pytest.raises(UserError, match=name):
            images.read(tmp_path / name)


def test_kmeans_finds_colours_that_are_there_and_quantise_the_nearest():
    centres = np.array([[10, 10, 10], [240, 20, 20], [20, 240, 20], [30, 30, 200]])
    owner = RNG.integers(0, 4, (20, 8, 8))
    noisy = np.clip(centres[owner] + RNG.integers(-6, 7, (20, 8, 8, 3)), 0, 255).astype(np.uint8)
    errors = []
    for seed in range(4):
        palette = images.kmeans(noisy, 4, seed)
        index = images.quantise(noisy, palette, rows=7)
        assert index.dtype == np.int32 and index.shape == owner.shape
        brute = ((noisy[..., None, :].astype(int) - palette[None, None, None].astype(int)) ** 2).sum(-1).argmin(-1)
        np.testing.assert_array_equal(index, brute)
        errors.append(np.abs(palette[index].astype(int) - noisy).mean())
    assert min(errors) < 5 and np.array_equal(images.kmeans(noisy, 4, 0), images.kmeans(noisy, 4, 0))
    with pytest.raises(UserError, match="1 distinct colours, fewer than data.colours=2"):
        images.kmeans(np.zeros((2, 4, 4, 3), np.uint8), 2)


def test_records_predict_every_pixel_from_those_before_it():
    record = images.records(INDICES, 7)
    flat = INDICES.reshape(6, 16)
    np.testing.assert_array_equal(record["targets"], flat)
    np.testing.assert_array_equal(record["tokens"], np.concatenate([np.full((6, 1), 7), flat[:, :-1]], axis=1))
    assert record["mask"].all() and (record["segments"] == 1).all()


def test_the_tokenizer_of_words_keeps_their_order_through_files(tmp_path):
    tokenizer = images.word_tokenizer([str(i) for i in range(7)])
    assert tokenizer.vocab_size == 8 and tokenizer.specials["eos"] == 7
    assert tokenizer.encode("3 0 6") == [3, 0, 6] and tokenizer.decode([3, 7, 0]) == "3 0"
    tokenizers.save(tokenizer, tmp_path)
    again = tokenizers.load(tmp_path)
    assert tokenizers.fingerprint(again) == tokenizers.fingerprint(tokenizer) and again.encode("5") == [5]


def test_pictures_are_pngs_of_the_pixels():
    sheet = images.grid(RGB, columns=4, gap=1, scale=2)
    assert sheet.shape == (2 * (2 * 5 + 1), 2 * (4 * 6 + 1), 3)
    np.testing.assert_array_equal(sheet[2:10:2, 2:12:2], RGB[0])
    np.testing.assert_array_equal(sheet[12:20:2, 14:24:2], RGB[5])
    file = images.png(sheet)
    assert file[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", file[16:24])
    size = struct.unpack(">I", file[33:37])[0]
    lines = np.frombuffer(zlib.decompress(file[41 : 41 + size]), np.uint8).reshape(height, 1 + 3 * width)
    np.testing.assert_array_equal(lines[:, 1:].reshape(height, width, 3), sheet)
    assert not lines[:, 0].any()
