"""The sharding report: what each device holds on a 2 x 2 x 2 mesh, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.core import sharding
from jaxllm.report import layout

AXES = {"policy/ffn/kernel": ("embed", "mlp"), "policy/norm/scale": ("embed",)}


def placed(mesh, shape, *spec, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def tree(mesh):
    return {
        "policy": {
            "embed": placed(mesh, (12, 8), ("data", "fsdp"), None, dtype=jnp.bfloat16),
            "ffn": {"kernel": placed(mesh, (8, 6), "fsdp", "tensor")},
            "norm": {"scale": placed(mesh, (8,))},
        }
    }


def test_rows_on_a_mesh():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    embed, kernel, scale = layout.rows(tree(mesh), AXES)
    assert kernel == layout.Row("policy/ffn/kernel", (8, 6), "float32", ("embed", "mlp"), (("fsdp",), ("tensor",)), (4, 3), 48, 2)
    assert embed.axes == (None, None) and embed.over == (("data", "fsdp"), ()), "no logical axes are known"
    assert (embed.shard, embed.bytes, embed.copies) == ((3, 8), 48, 2)
    assert (scale.shard, scale.bytes, scale.copies) == ((8,), 32, 8)
    assert [r.replicated for r in (embed, kernel, scale)] == [False, False, True]
    assert layout.total([embed, kernel, scale]) == {
        "arrays": 3, "device": 128, "once": 192 + 192 + 32, "replicated": 1, "replicated_bytes": 32
    }  # fmt: skip


def test_real_arrays_are_counted_as_their_shards_are():
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    x = jax.device_put(np.zeros((8, 6), np.float32), NamedSharding(mesh, PartitionSpec("fsdp", None)))
    (row,) = layout.rows({"x": x, "host": np.zeros(3), "number": 1})
    assert row.bytes == x.addressable_shards[0].data.nbytes == 48
    assert row.copies == sum(s.index == x.addressable_shards[0].index for s in x.addressable_shards) == 2


def test_one_device_replicates_nothing():
    mesh = sharding.make_mesh({})
    assert not any(r.replicated for r in layout.rows(tree(mesh)))
    assert "replicated" not in layout.report(tree(mesh), {}, {}, mesh)


def test_the_report_in_words():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    params, shared = tree(mesh), placed(mesh, (16,))
    moments = {"mu": params["policy"], "count": placed(mesh, (), dtype=jnp.int32)}
    frozen = {"policy": {"base": shared}, "reference": {"base": shared}}
    lines = layout.report(params, frozen, moments, mesh, AXES).split("\n")
    assert lines[0] == "sharding: data=2 fsdp=2 tensor=2 (8 devices)"
    assert lines[1].split() == ["parameter", "shape", "dtype", "layout", "a", "device", "holds", "bytes", "copies"]
    assert lines[3].split() == ["policy/ffn/kernel", "8x6", "float32", "embed>fsdp,", "mlp>tensor", "4x3", "48", "B", "2"]
    assert lines[4].split() == ["policy/norm/scale", "8", "float32", "embed", "8", "32", "B", "all"]
    assert lines[2].split()[3:5] == ["->data+fsdp,", "-"]
    assert lines[6:] == [
        "  trained parameters: 128 B a device of 416 B; replicated: 1 of 3 arrays, 32 B",
        "  frozen parameters: 64 B a device of 64 B; replicated: 1 of 1 arrays, 64 B",
        "  optimizer: 132 B a device of 420 B; replicated: 2 of 4 arrays, 36 B",
        "  largest replicated array: policy/base 16, 64 B a device",
    ]


def test_amounts():
    assert [layout.amount(x) for x in (0, 512, 1536, 20 * 2**20, 3.25 * 2**30)] == [
        "0 B", "512 B", "1.5 KiB", "20 MiB", "3.25 GiB"
    ]  # fmt: skip
