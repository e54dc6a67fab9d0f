"""Spec trees: initial values, shapes, counts and shardings all come from one description."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxllm.core import sharding, spec
from jaxllm.core.spec import Spec
from jaxllm.core.types import UserError

NORMAL = jax.nn.initializers.normal(1.0)
GOLDEN = [-0.68328613, -0.13655533, -0.20991491, 1.5626664]


def tree():
    return {
        "a": {"kernel": Spec((8, 4), ("embed", "mlp"), NORMAL)},
        "b": {
            "kernel": Spec((8, 4), ("embed", "mlp"), NORMAL),
            "bias": Spec((4,), ("mlp",), jax.nn.initializers.zeros),
        },
    }


def test_adding_a_leaf_moves_no_other():
    key = jax.random.key(0)
    before = spec.init(tree(), key)
    after = spec.init({"A": {"first": Spec((3,), (None,), NORMAL)}, **tree()}, key)
    for path in (("a", "kernel"), ("b", "kernel"), ("b", "bias")):
        np.testing.assert_array_equal(before[path[0]][path[1]], after[path[0]][path[1]])
    assert not np.array_equal(before["a"]["kernel"], before["b"]["kernel"])


def test_golden_initial_values():
    """Initial values are part of a run's identity: a seed must give the same model next year."""
    got = np.asarray(spec.init(tree(), jax.random.key(0))["a"]["kernel"])
    message = f"initial values moved: if on purpose, put {got[0].tolist()} here and say so in the commit"
    np.testing.assert_allclose(got[0], GOLDEN, rtol=1e-5, err_msg=message)


def test_another_key_draws_other_values():
    one, two = (spec.init(tree(), jax.random.key(k))["a"]["kernel"] for k in (0, 1))
    assert not np.array_equal(one, two)


def test_stacked_layers_draw_their_own_values_with_the_layer_initializer():
    seen = []

    def init(key, shape, dtype):
        seen.append(shape)
        return jax.random.normal(key, shape, dtype)

    stacked = spec.stack({"w": Spec((5, 3), ("embed", "mlp"), init)}, 4)
    assert stacked["w"].shape == (4, 5, 3) and stacked["w"].axes == ("layers", "embed", "mlp")
    w = np.asarray(spec.init(stacked, jax.random.key(0))["w"])
    assert len({row.tobytes() for row in w}) == 4
    assert set(seen) == {(5, 3)}, "an initializer must see one layer's shape: fan-in depends on it"


def test_count_and_abstract():
    assert spec.count(tree()) == 8 * 4 * 2 + 4
    shapes = spec.abstract({"w": Spec((2, 3), (None, None), NORMAL, jnp.bfloat16)})
    assert shapes["w"].shape == (2, 3) and shapes["w"].dtype == jnp.bfloat16


def test_shape_and_axes_must_agree():
    with pytest.raises(ValueError, match="differ in length"):
        Spec((2, 3), ("embed",), NORMAL)


def test_shardings_follow_the_rules():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    where = spec.shardings(tree(), mesh, sharding.RULES)
    assert where["a"]["kernel"].spec == P("fsdp", "tensor") and where["b"]["bias"].spec == P("tensor")
    made = jax.jit(lambda k: spec.init(tree(), k), out_shardings=where)(jax.random.key(0))
    assert made["a"]["kernel"].addressable_shards[0].data.shape == (4, 2)
    np.testing.assert_array_equal(made["a"]["kernel"], spec.init(tree(), jax.random.key(0))["a"]["kernel"])
    assert spec.abstract(tree(), where)["a"]["kernel"].sharding == where["a"]["kernel"]


def test_two_axes_on_one_mesh_axis_are_refused_by_name():
    mesh = sharding.make_mesh({"tensor": 2})
    with pytest.raises(UserError, match=r"a/kernel.*'heads' and 'mlp'.*'tensor'"):
        spec.shardings({"a": {"kernel": Spec((4, 4), ("heads", "mlp"), NORMAL)}}, mesh, sharding.RULES)
    # the same parameter is fine where that mesh axis has size 1
    one = sharding.make_mesh({"fsdp": 2})
    spec.shardings({"a": {"kernel": Spec((4, 4), ("heads", "mlp"), NORMAL)}}, one, sharding.RULES)


def test_a_dimension_that_does_not_divide_is_refused_by_name():
    mesh = sharding.make_mesh({"tensor": 4})
    with pytest.raises(UserError, match=r"a/kernel.*'mlp' of size 6.*4 devices"):
        spec.shardings({"a": {"kernel": Spec((8, 6), ("embed", "mlp"), NORMAL)}}, mesh, sharding.RULES)
