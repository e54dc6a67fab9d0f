"""The guarded reader: crafted files that lie about themselves, and every dtype both ways."""

import json
import os
import time

import ml_dtypes
import numpy as np
import pytest

from jaxllm.convert import safetensors
from jaxllm.core.types import UserError

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def craft(path, header, data=b"\0" * 16, length=None):
    """A file with this header (text, or a record) over this data; length: what its first 8 bytes claim."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def tensors(*spans):
    """Tensors of float32 at (begin, end)."""
    return {f"t{i}": {"dtype": "F32", "shape": [(e - b) // 4], "data_offsets": [b, e]} for i, (b, e) in enumerate(spans)}


BAD = {
    "shorter than a length": (b"", b"", None, "truncated"),
    "header beyond the file": ({"a": A}, b"\0" * 8, 10_000, "truncated"),
    "header of 2**63 bytes": ({"a": A}, b"\0" * 8, 2**63, "truncated"),
    "not JSON": (b'{"a": ', b"\0" * 8, None, "not JSON"),
    "not UTF-8": (b"\xff\xfe{}", b"\0" * 8, None, "not JSON"),
    "nested without end": (b"[" * 200_000, b"", None, "not JSON"),
    "a list": (b"[]", b"", None, "JSON object"),
    "a name twice": (json.dumps({"a": A}).encode()[:-1] + b"," + json.dumps({"a": A}).encode()[1:], b"\0" * 8, None, "twice"),
    "an entry that is a number": ({"a": 3}, b"", None, "needs dtype"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8, None, "needs dtype"),
    "an unknown dtype": ({"a": {**A, "dtype": "OBJECT"}}, b"\0" * 8, None, "dtype 'OBJECT'"),
    "a quantised dtype": ({"a": {**A, "dtype": "F8_E4M3"}}, b"\0" * 8, None, "convert first"),
    "a negative size": ({"a": {**A, "shape": [-2]}}, b"\0" * 8, None, "natural"),
    "a fractional size": ({"a": {**A, "shape": [2.0]}}, b"\0" * 8, None, "natural"),
    "a size of true": ({"a": {**A, "shape": [True, 2]}}, b"\0" * 8, None, "natural"),
    "three offsets": ({"a": {**A, "data_offsets": [0, 8, 8]}}, b"\0" * 8, None, "natural"),
    "a negative offset": ({"a": {**A, "data_offsets": [-8, 0]}}, b"\0" * 8, None, "natural"),
    "beyond the data": ({"a": {**A, "data_offsets": [8, 16]}}, b"\0" * 8, None, "outside the file"),
    "an end before the begin": ({"a": {**A, "data_offsets": [8, 0]}}, b"\0" * 8, None, "outside the file"),
    "truncated data": ({"a": A}, b"\0" * 7, None, "outside the file"),
    "a shape that overflows": ({"a": {**A, "shape": [2**40, 2**40]}}, b"\0" * 8, None, "takes"),
    "a shape without end": ({"a": {**A, "shape": [2**62] * 100_000}}, b"\0" * 8, None, "natural"),
    "a size of 4,000 digits": ({"a": {**A, "shape": [10**4000]}}, b"\0" * 8, None, "natural"),
    "a shape of another size": ({"a": {**A, "shape": [3]}}, b"\0" * 8, None, "takes 12 bytes"),
    "overlapping tensors": (tensors((0, 8), (4, 12)), b"\0" * 12, None, "overlaps"),
    "the same bytes twice": (tensors((0, 8), (0, 8)), b"\0" * 8, None, "overlaps"),
    "a hole": (tensors((0, 4), (8, 12)), b"\0" * 12, None, "belong to none"),
    "bytes behind the last": (tensors((0, 4)), b"\0" * 12, None, "its tensors take 4"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_lies_is_refused(case, tmp_path):
    header, data, length, words = BAD[case]
    file = craft(tmp_path / "model.safetensors", header, data, length)
    if case == "shorter than a length":
        file.write_bytes(b"\1\0")
    with pytest.raises(UserError, match=words) as error:
        safetensors.scan(tmp_path)
    assert "model.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_a_name_twice_among_many_is_found_at_once(tmp_path):
    begun = time.process_time()
    with pytest.raises(UserError, match="'k99999' stands twice"):
        safetensors.parse_json("{" + ",".join(f'"k{i}":0' for i in range(100_000)) + ',"k99999":0}', "x")
    assert time.process_time() - begun < 5


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_pipe_is_refused_instead_of_waited_for(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: is no plain file"):
        safetensors.scan(tmp_path)


def test_the_crafted_file_is_read_when_it_does_not_lie(tmp_path):
    craft(tmp_path / "model.safetensors", tensors((8, 16), (0, 8)), np.arange(4, dtype=np.float32).tobytes())
    found = safetensors.scan(tmp_path)
    assert safetensors.view(found["t0"]).tolist() == [2, 3] and safetensors.view(found["t1"]).tolist() == [0, 1]


def test_a_header_over_100_mb_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    with file.open("wb") as f:
        f.write((safetensors.MAX_HEADER + 1).to_bytes(8, "little"))
        f.truncate(safetensors.MAX_HEADER + 100)  # sparse: no disk is used
    with pytest.raises(UserError, match="over 100 MB"):
        safetensors.scan(tmp_path)


def index(directory, weight_map):
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    "name",
    ["../a.safetensors", "/etc/a.safetensors", "a/b.safetensors", "evil.bin", "x.safetensors\n", "", "..", "a\0.safetensors"],
)  # fmt: skip
def test_hostile_shard_names_are_refused(name, tmp_path):
    inner = tmp_path / "model"
    inner.mkdir()
    craft(tmp_path / "a.safetensors", tensors((0, 16)))
    index(inner, {"t0": name})
    with pytest.raises(UserError, match="no name of a shard"):
        safetensors.scan(inner)


def test_an_index_must_be_whole(tmp_path):
    index(tmp_path, {"t0": "model-00001-of-00001.safetensors"})
    with pytest.raises(UserError, match="is not there"):
        safetensors.scan(tmp_path)
    index(tmp_path, {})
    with pytest.raises(UserError, match="no weight_map"):
        safetensors.scan(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        safetensors.scan(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        craft(tmp_path / name, tensors((0, 16)))
    index(tmp_path, {"t0": "a.safetensors", "t1": "b.safetensors"})
    with pytest.raises(UserError, match="stands in a.safetensors and in b.safetensors"):
        safetensors.scan(tmp_path)


def test_several_files_need_an_index(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        craft(tmp_path / name, tensors((0, 16)))
    with pytest.raises(UserError, match="no model.safetensors.index.json"):
        safetensors.scan(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "shard.safetensors", "config.json"])
def test_a_link_that_leaves_the_directory_is_refused(name, tmp_path):
    inner, outer = tmp_path / "model", tmp_path / "secret"
    inner.mkdir()
    craft(outer, tensors((0, 16)))
    os.symlink(outer, inner / name)
    if name.startswith("shard"):
        index(inner, {"t0": name})
    with pytest.raises(UserError, match="leads out of the directory"):
        safetensors.read_json(inner, name) if name == "config.json" else safetensors.scan(inner)


def test_a_hub_snapshot_links_to_its_blobs(tmp_path):
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    craft(blobs / "123", tensors((0, 16)))
    os.symlink("../../blobs/123", snapshot / "model.safetensors")
    assert list(safetensors.scan(snapshot)) == ["t0"]
    craft(tmp_path / "outside", tensors((0, 16)))
    (snapshot / "model.safetensors").unlink()
    os.symlink(tmp_path / "outside", snapshot / "model.safetensors")
    with pytest.raises(UserError, match="leads out"):
        safetensors.scan(snapshot)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "weights.pkl", "model.npz"])
def test_pickles_are_refused_with_the_way_out(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x80\x04cposix\nsystem\n.")
    with pytest.raises(UserError, match=f"{name} may run code.*save_pretrained"):
        safetensors.scan(tmp_path)


def test_pickles_beside_safetensors_are_left_alone(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    craft(tmp_path / "model.safetensors", tensors((0, 16)))
    assert list(safetensors.scan(tmp_path)) == ["t0"]


def test_every_dtype_both_ways_and_as_the_library_reads_it(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {name: rng.integers(0, 2, (3, 5)).astype(dtype) for name, dtype in safetensors.DTYPES.items()}
    arrays["BF16"] = rng.normal(size=(2, 3, 4)).astype(ml_dtypes.bfloat16)
    arrays["F16"] = rng.normal(size=(7,)).astype(np.float16)
    arrays |= {"scalar": np.float32(rng.normal(size=())), "empty": np.zeros((0, 4), np.float32), "turned": arrays["F32"].T}
    planned = [(name, a.dtype, a.shape) for name, a in arrays.items()]
    safetensors.write(tmp_path / "model.safetensors", planned, arrays.values())
    found = safetensors.scan(tmp_path)
    for name, array in arrays.items():
        got = safetensors.view(found[name])
        assert got.dtype == array.dtype and got.shape == array.shape and got.tobytes() == array.tobytes(), name
        assert not got.flags.writeable or got.size == 0
    library = pytest.importorskip("safetensors.numpy")
    read = library.load_file(tmp_path / "model.safetensors")
    assert read["F16"].tobytes() == arrays["F16"].tobytes() and read["turned"].tobytes() == arrays["turned"].tobytes()
    library.save_file({n: a for n, a in arrays.items() if n not in ("turned", "scalar")}, tmp_path / "model.safetensors")
    assert safetensors.view(safetensors.scan(tmp_path)["BF16"]).tobytes() == arrays["BF16"].tobytes()


def test_writing_keeps_to_the_plan(tmp_path):
    with pytest.raises(ValueError, match="planned"):
        safetensors.write(tmp_path / "x", [("a", np.dtype(np.float32), (2,))], [np.zeros(3, np.float32)])
