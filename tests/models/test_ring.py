"""Ring attention over the mesh axis `context`: a model split over it equals one device."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core import sharding
from jaxllm.core.spec import shardings
from jaxllm.core.types import UserError
from jaxllm.models import families, kernels
from jaxllm.models.encoder import EncoderConfig
from tests.models import test_kernels
from tests.models.tiny import DEEPSEEK, GEMMA, LLAMA, fast_jit, weights

SEGMENTS = np.array([[1] * 7 + [2] * 16 + [3] * 9 + [0] * 8, [1] * 30 + [0] * 10] * 2, np.int32)
TOKENS = np.random.default_rng(0).integers(1, 50, SEGMENTS.shape).astype(np.int32)
LENGTH = TOKENS.shape[1]


@pytest.mark.parametrize("case", ["packed", "window", "both directions, groups"])
def test_the_ring_is_the_plain_reference(case):
    ring = partial(kernels.in_blocks, ring=True, block=4)  # 28 positions are 7 a device: two blocks of 4, one of them padded
    with sharding.use(sharding.make_mesh({"context": 4, "tensor": 2})):
        test_kernels.compare(ring, test_kernels.CASES[case], 28, np.pad(test_kernels.SEGMENTS, ((0, 0), (0, 4))))


def value_and_grad(config, mesh=None, rules=""):
    """A loss of the hidden states and its gradients, on one device or on a mesh; and the compiled text."""
    model = families.make(config)
    params = weights(model.specs)

    def loss(params, tokens, segments):
        hidden = model.apply(params, tokens, segments=segments).hidden
        return jnp.sum(jnp.where((segments != 0)[:, :, None], jnp.sin(hidden), 0)) / segments.size

    if mesh is None:
        compiled = fast_jit(jax.value_and_grad(loss)).lower(params, TOKENS, SEGMENTS).compile()
        return compiled(params, TOKENS, SEGMENTS), compiled.as_text()
    with sharding.use(sharding.make_mesh(mesh), sharding.make_rules(rules)) as mesh:
        params = jax.device_put(params, shardings(model.specs, mesh, sharding.current_rules()))
        batch = [sharding.put_batch(x, mesh) for x in (TOKENS, SEGMENTS)]
        compiled = fast_jit(jax.value_and_grad(loss)).lower(params, *batch).compile()
        return jax.block_until_ready(compiled(params, *batch)), compiled.as_text()


CASES = {
    "tensor with fewer key heads, remat": (replace(LLAMA, remat="full"), {"context": 2, "tensor": 4}, "kv_heads=none"),
    "fsdp, windows across devices, softcap": (replace(GEMMA, windows=(11, 0), n_layers=2), {"context": 4, "fsdp": 2}, ""),
    "data, latent attention": (
        replace(DEEPSEEK, moe=None, dense_layers=0, mtp_layers=0, n_layers=1), {"context": 4, "data": 2},
        "residual=context+tensor",
    ),
    "encoder, sequence parallelism": (
        EncoderConfig(vocab_size=50, max_length=LENGTH, d_model=16, n_layers=1, n_heads=2, d_ff=24, mlm=False),
        {"context": 2, "tensor": 2, "data": 2}, "residual=context+tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("config", "mesh", "rules"), CASES.values(), ids=CASES)
def test_a_model_split_over_context_equals_one_device(config, mesh, rules):
    (expected, grads), plain = value_and_grad(replace(config, attention="plain"))
    (got, split), text = value_and_grad(config, mesh, rules)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), split, grads)
    assert "collective-permute" in text
    lengths = (LENGTH, LENGTH // mesh["context"])
    assert squares(plain, lengths) and not squares(text, lengths)


def squares(text, lengths):
    """Shapes in a compiled text with a dimension of the whole length beside another one of it or of a device's part."""
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"\w\[([\d,]+)\]", text)}
    return {s for s in shapes if LENGTH in s and sum(n in lengths for n in s) > 1}


def test_the_mesh_chooses_the_ring():
    choose = partial(kernels.choose, widths=(8, 8), dtype="float32")
    with sharding.use(sharding.make_mesh({"context": 4})):
        assert (choose("auto", 32), choose("auto", 30)) == ("ring", "plain")
        with pytest.raises(UserError, match="no mesh axis splits the length 30: give mesh.context a divisor.*which takes plain"):
            choose("ring", 30)
    with sharding.use(sharding.make_mesh({"context": 4}), sharding.make_rules("length=none")):
        assert choose("auto", 32) == "plain"
