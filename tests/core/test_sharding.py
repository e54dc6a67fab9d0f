"""Meshes and activations' constraints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxllm.core import sharding
from jaxllm.core.types import UserError


def test_a_mesh_has_every_axis_and_auto_types():
    mesh = sharding.make_mesh({"data": 2, "tensor": 4})
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 4, "expert": 1, "context": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert sharding.make_mesh().size == 1


def test_minus_one_takes_the_devices_that_are_left():
    assert sharding.make_mesh({"data": -1, "tensor": 2}).shape["data"] == jax.device_count() // 2
    assert sharding.make_mesh({"fsdp": -1}).shape["fsdp"] == jax.device_count()


@pytest.mark.parametrize(
    "sizes,message",
    [
        ({"model": 2}, "unknown mesh axis 'model'.*data, fsdp, tensor"),
        ({"data": 0}, "at least 1"),
        ({"data": -2}, "at least 1"),
        ({"data": -1, "fsdp": -1}, "one may be -1"),
        ({"data": 1024}, "needs 1024 devices, here are 8"),
    ],
)
def test_impossible_meshes_are_one_clear_line(sizes, message):
    with pytest.raises(UserError, match=message) as error:
        sharding.make_mesh(sizes)
    assert "\n" not in str(error.value)


def test_shard_is_the_identity_without_a_mesh():
    x = jnp.ones((2, 3))
    assert sharding.shard(x, "batch", None) is x
    assert sharding.axis_size("batch") == 1
    with sharding.use(sharding.make_mesh({"data": 1})):
        assert sharding.shard(x, "batch", None) is x


def test_shard_splits_under_a_mesh_and_use_restores_the_rules():
    rules = {**sharding.RULES, "batch": "tensor"}
    for table, shape in ((sharding.RULES, (4, 6)), (rules, (2, 6))):
        with sharding.use(sharding.make_mesh({"data": 2, "tensor": 4}), table):
            assert sharding.axis_size("batch") == 8 // shape[0]
            y = jax.jit(lambda x: sharding.shard(x, "batch", None))(jnp.ones((8, 6)))
            assert y.addressable_shards[0].data.shape == shape
    assert sharding.axis_size("batch") == 1


def test_batches_are_split_over_data_and_fsdp_or_refused():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    batch = {"x": np.arange(24).reshape(8, 3)}
    placed = sharding.put_batch(batch, mesh)["x"]
    assert placed.addressable_shards[0].data.shape == (2, 3)
    np.testing.assert_array_equal(placed, batch["x"])
    with pytest.raises(UserError, match="batch_size 6 does not divide over the 4 devices.*multiple of 4"):
        sharding.put_batch({"x": np.zeros((6, 3))}, mesh)


def test_replicate_puts_everything_everywhere():
    mesh = sharding.make_mesh({"data": 4})
    x = sharding.replicate({"x": jnp.arange(3)}, mesh)["x"]
    assert len(x.addressable_shards) == 4 and all(s.data.shape == (3,) for s in x.addressable_shards)


# ---- rules


def test_rules_are_read_from_a_text():
    rules = sharding.make_rules("residual = context+tensor, vocab=none")
    assert rules["residual"] == ("context", "tensor") and rules["vocab"] is None
    assert {k: v for k, v in rules.items() if k not in ("residual", "vocab")} == {
        k: v for k, v in sharding.RULES.items() if k not in ("residual", "vocab")
    }
    assert sharding.make_rules() == sharding.RULES


@pytest.mark.parametrize(
    "text,message",
    [
        ("model=tensor", "unknown logical axis 'model'.*batch, length"),
        ("embed=model", "unknown mesh axis 'model'.*data, fsdp"),
        ("embed", "give each mesh axis once"),
        ("embed=fsdp+fsdp", "give each mesh axis once"),
    ],
)
def test_rules_that_mean_nothing_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        sharding.make_rules(text)


def test_two_axes_of_an_activation_on_one_mesh_axis_are_refused():
    with (
        sharding.use(sharding.make_mesh({"tensor": 2}), sharding.make_rules("length=tensor")),
        pytest.raises(UserError, match="'length' and 'heads' both map to mesh axis 'tensor'"),
    ):
        sharding.shard(jnp.ones((2, 4, 4)), "batch", "length", "heads")


def test_what_does_not_divide_stays_whole():
    with sharding.use(sharding.make_mesh({"context": 2, "data": 2})):
        y = jax.jit(lambda x: sharding.shard(x, "batch", "length"))(jnp.ones((4, 1)))
    assert y.addressable_shards[0].data.shape == (2, 1)


# ---- devices


class Device:
    """As much of a device as a mesh of several slices looks at."""

    platform, device_kind = "tpu", "TPU v4"

    def __init__(self, i, slice_index):
        self.id, self.slice_index, self.process_index = i, slice_index, i // 4
        self.coords, self.core_on_chip = (i % 2, i // 2 % 2, 0), 0


def test_the_slowest_links_carry_data_parallelism():
    devices = [Device(i, i // 4) for i in range(8)]
    for sizes, axis in (({"data": 2, "fsdp": 4}, 0), ({"data": 4, "tensor": 2}, 0), ({"fsdp": 4, "tensor": 2}, 1)):
        grid = sharding._grid([sizes.get(a, 1) for a in sharding.AXES], devices)
        slices = np.vectorize(lambda d: d.slice_index)(grid)
        assert grid.shape == tuple(sizes.get(a, 1) for a in sharding.AXES)
        halves = np.split(slices, 2, axis=axis)
        assert (halves[0] == 0).all() and (halves[1] == 1).all(), "a slice is one half of the axis"
    with pytest.raises(UserError, match="one must be a multiple of the 2 slices"):
        sharding._grid([1, 1, 8, 1, 1], devices)


def test_which_rows_a_process_reads():
    mesh = sharding.make_mesh({"data": 2, "tensor": 2, "fsdp": 2})
    with sharding.use(mesh):
        assert sharding.process_rows(mesh) == (0, 1)
