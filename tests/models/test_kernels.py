"""Every attention kernel against the plain reference: values, gradients, and what is in memory."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.types import UserError
from jaxllm.models import decoder, encoder, kernels, plain
from jaxllm.models.attention import attend
from tests.models.tiny import DEEPSEEK, GEMMA, LLAMA, fast_jit, weights

SEGMENTS = np.array([[1] * 7 + [2] * 5 + [3] * 9 + [0] * 3, [1] * 20 + [0] * 4], np.int32)
CASES = {  # what differs from causal attention of 4 heads of width 8 over packed segments with padding at the end
    "packed": {},
    "one segment": {"segments": None},
    "window": {"window": 5},
    "groups": {"g": 2},
    "softcap and scale": {"softcap": 2.0, "scale": 0.7, "g": 1},
    "value width": {"width": 5},
    "both directions": {"causal": False},
    "both directions, groups": {"causal": False, "g": 2, "segments": None},
}


def arrays(l, h=4, g=4, k=8, width=8, b=2, seed=0, dtype=np.float32):  # noqa: E741
    rng = np.random.default_rng(seed)
    shapes = ((b, l, h, k), (b, g, l, k), (b, g, l, width), (b, l, h, width))
    return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


def both_ways(run, q, k, v, grad, used):
    """(Output where `used`, gradients of q, k, v) when the result is read where `used`."""

    @fast_jit
    def one(q, k, v):
        out, back = jax.vjp(run, q, k, v)
        return out * used, back(grad * used)

    return jax.tree.map(np.asarray, one(q, k, v))


def compare(kernel, case, length, segments, tolerance=1e-5):
    case = dict(case)
    segments = case.pop("segments", segments)
    segments = None if segments is None else jnp.asarray(segments)
    causal, window = case.pop("causal", True), case.pop("window", 0)
    softcap, scale = case.pop("softcap", None), case.pop("scale", None)
    q, k, v, grad = arrays(length, **case)
    seen = kernels.Seen(segments, q.shape[:2], causal=causal, window=window)
    used = jnp.ones((2, length, 1, 1)) if segments is None else (segments != 0).astype(jnp.float32)[:, :, None, None]
    expected = both_ways(lambda q, k, v: attend(q, k, v, seen.array(), scale=scale, softcap=softcap), q, k, v, grad, used)
    got = both_ways(lambda q, k, v: kernel(q, k, v, seen, scale=scale, softcap=softcap), q, k, v, grad, used)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, expected)


def textbook(q, k, v, seen, *, scale=None, softcap=None):
    """softmax(q k^T) v, for JAX to differentiate."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[1], axis=1) for x in (k, v))
    scores = jnp.einsum("blhk,bhsk->bhls", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = jnp.where(seen.array()[:, None], scores, -1e30)
    return jnp.einsum("bhls,bhsw->blhw", jax.nn.softmax(scores, axis=-1), v)


@pytest.mark.parametrize("least", [24, 7], ids=["one block", "three blocks"])
@pytest.mark.parametrize("case", [n for n, case in CASES.items() if "softcap" not in case])
def test_the_written_gradient_is_the_one_that_jax_derives(case, least, monkeypatch):
    monkeypatch.setattr(plain, "LEAST", least)
    case = dict(CASES[case])
    segments, causal, window = case.pop("segments", SEGMENTS), case.pop("causal", True), case.pop("window", 0)
    q, k, v, grad = arrays(24, **case)
    seen = kernels.Seen(None if segments is None else jnp.asarray(segments), (2, 24), causal=causal, window=window)
    assert len(plain._blocks(24, 24, causal, window)) == (24 // least if causal else 1)
    used = np.ones((2, 24, 1, 1)) if segments is None else (segments != 0).astype(np.float32)[:, :, None, None]
    expected, got = (
        both_ways(lambda q, k, v, run=run: run(q, k, v, seen), q, k, v, grad, used) for run in (textbook, kernels.plain_scores)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)


def test_later_keys_of_a_causal_mask_are_not_computed():
    q, k, v, _ = arrays(256)
    seen = kernels.Seen(None, (2, 256))
    text = str(jax.make_jaxpr(jax.grad(lambda q: jnp.sum(kernels.plain_scores(q, k, v, seen)[:, :64])))(q))
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"f32\[([\d,]+)\] = dot_general", text)}
    scores = {shape[-2:] for shape in shapes if shape[-1] % 64 == 0}
    assert {(64, 64), (64, 128), (64, 192), (64, 256)} <= scores and (256, 256) not in scores


@pytest.mark.parametrize("block", [8, 7])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_blocks_are_the_plain_reference(case, block):
    compare(partial(kernels.in_blocks, block=block), case, 24, SEGMENTS)


@pytest.mark.parametrize("case", ["packed", "window", "groups", "value width", "both directions"])
def test_what_goes_to_cudnn_is_the_plain_reference(case):
    # cuDNN needs a GPU; here the same call is answered by XLA
    compare(partial(kernels.cudnn, implementation="xla"), CASES[case], 24, SEGMENTS)


@pytest.mark.parametrize(("segments", "window", "call"), [(False, 64, "fmhaSoftmax"), (True, 0, "fmhaScaleBiasSoftmax")])
def test_cudnn_makes_no_scores(segments, window, call, monkeypatch):
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91_500)
    q, k, v, _ = arrays(256, g=2, dtype=jnp.bfloat16)
    seen = kernels.Seen(jnp.ones((2, 256), jnp.int32) if segments else None, (2, 256), window=window)
    grads = jax.grad(lambda *x: kernels.cudnn(*x, seen).astype(jnp.float32).sum(), (0, 1, 2))
    text = jax.jit(grads).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    assert f"__cudnn${call}Backward" in text
    square = set(re.findall(r"tensor<([x0-9]*256x256)x", text))
    assert square == ({"2x256x256", "2x1x256x256"} if segments else set())  # never one for each head


SPLASH = {
    "packed": {"k": 64, "width": 64},
    "window, softcap, scale and groups": {"window": 130, "softcap": 2.0, "scale": 0.2, "g": 2, "h": 4},
    "both directions, value width": {"causal": False, "segments": None, "width": 16},
}


@pytest.mark.parametrize("case", SPLASH.values(), ids=SPLASH)
def test_splash_is_the_plain_reference(case):
    segments = np.repeat(SEGMENTS, 16, axis=1)[:, :384]
    compare(partial(kernels.splash, interpret=True), {"h": 2, "g": 2, **case}, 384, segments, 2e-5)


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one segment", "packed"])
def test_blocks_hold_no_square_of_the_length(segments):
    q, k, v, _ = arrays(240, h=2, g=1)
    seen = kernels.Seen(None if segments is None else jnp.repeat(jnp.asarray(segments), 10, axis=1), (2, 240))
    sizes = {}
    for name, kernel in (("plain", kernels.plain_scores), ("blocks", partial(kernels.in_blocks, block=48))):
        grads = jax.grad(lambda *x, kernel=kernel: jnp.sum(jnp.sin(kernel(*x, seen))), (0, 1, 2))
        text = fast_jit(grads).lower(q, k, v).compile().as_text()
        shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"\w\[([\d,]+)\]", text)}
        sizes[name] = max(int(np.prod([n for n in shape if n % 48 == 0] or [0])) for shape in shapes)
    assert sizes == {"plain": 240 * 240, "blocks": 240 * 48} or sizes["blocks"] < 240 * 240 <= sizes["plain"]


def test_a_row_of_padding_alone_is_finite():
    q, k, v, grad = arrays(24)
    seen = kernels.Seen(jnp.zeros((2, 24), jnp.int32), (2, 24), causal=False)
    for kernel in (partial(kernels.in_blocks, block=8), partial(kernels.cudnn, implementation="xla")):
        found = both_ways(lambda q, k, v, kernel=kernel: kernel(q, k, v, seen), q, k, v, grad, 1.0)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


# ---- models


@pytest.mark.parametrize("style", ["llama", "gemma", "deepseek"])
def test_a_decoder_in_blocks_is_the_plain_one(style):
    config = {
        "llama": replace(LLAMA, remat="full"),
        "gemma": replace(GEMMA, n_layers=2, windows=(3, 0)),
        "deepseek": replace(DEEPSEEK, n_layers=1, moe=None, dense_layers=0, mtp_layers=0),
    }[style]
    same_model(decoder.make, replace(config, attention="plain"), replace(config, attention="blocks"))


def test_an_encoder_in_blocks_is_the_plain_one():
    config = encoder.EncoderConfig(vocab_size=50, max_length=32, d_model=16, n_layers=2, n_heads=2, d_ff=24, attention="plain")
    same_model(encoder.make, config, replace(config, attention="blocks"))


def same_model(make, *configs):
    """Models of the configs agree in hidden states where there is a token, and in gradients of the weights."""
    params = weights(make(configs[0]).specs)
    tokens = np.random.default_rng(0).integers(1, 50, SEGMENTS.shape).astype(np.int32)

    def run(config):
        def loss(params):
            hidden = make(config).apply(params, tokens, segments=jnp.asarray(SEGMENTS)).hidden
            return jnp.sum(jnp.where((SEGMENTS != 0)[:, :, None], jnp.sin(hidden), 0))

        return fast_jit(jax.value_and_grad(loss))(params)

    expected, got = map(run, configs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), got, expected)


# ---- the choice


def test_on_cpu_attention_stays_one_mask_for_all_layers():
    mask = kernels.see("auto", None, (2, 24), window=3, widths=(8, 8), dtype="float32")
    np.testing.assert_array_equal(mask.formed, kernels.Seen(None, (2, 24), window=3).array())


@pytest.mark.parametrize(
    ("device", "length", "settings", "expected"),
    [
        ("tpu", 1024, {}, "splash"), ("tpu", 1000, {}, "blocks"), ("gpu", 1000, {}, "cudnn"),
        ("gpu", 1024, {"dtype": "float32"}, "blocks"), ("gpu", 1024, {"softcap": 50.0}, "blocks"),
        ("gpu", 1024, {"widths": (192, 128)}, "cudnn"), ("cpu", 1024, {}, "plain"),
    ],
)  # fmt: skip
def test_the_backend_chooses(device, length, settings, expected, monkeypatch):
    monkeypatch.setattr(kernels, "platform", lambda: device)
    assert kernels.choose("auto", length, **{"widths": (64, 64), "dtype": "bfloat16", **settings}) == expected


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "splash",
            "model.attention=splash: the kernel is for TPUs, and this is cpu; use model.attention=auto, which takes plain",
        ),
        ("cudnn", "for NVIDIA GPUs, and this is cpu"),
        ("ring", "no mesh axis splits the length 24: give mesh.context a divisor of it above 1"),
    ],
)
def test_a_kernel_that_cannot_run_here_says_so(name, says):
    with pytest.raises(UserError, match=re.escape(says)):
        kernels.choose(name, 24, widths=(8, 8), dtype="float32")
    with pytest.raises(UserError, match="model.attention='flash': choose one of auto, plain, blocks, ring, cudnn, splash"):
        decoder.make(replace(LLAMA, attention="flash"))
