"""The bridge between images and a frozen decoder: exact at the start, causal over images, and alone in learning."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.core import ops, spec, tree
from jaxllm.core.types import UserError
from jaxllm.generate.decode import generate
from jaxllm.losses import lm
from jaxllm.models import decoder, families, flamingo
from jaxllm.models.flamingo import FlamingoConfig, VisionConfig
from jaxllm.train.step import init_state, make_train_step
from tests.models.tiny import GPT2, LLAMA, documents, fast_jit, record, weights

VISION = VisionConfig(colours=5, size=4, patch=2, n_layers=1, n_heads=2)
SMALL = FlamingoConfig(
    decoder=replace(LLAMA, n_layers=3), vision=VISION, d_vision=8, n_patches=4, n_latents=3, resampler_layers=2, every=2,
    n_heads=2,
)  # fmt: skip
MODEL = flamingo.make(SMALL)
TEXT = decoder.make(SMALL.decoder)
PARAMS = weights(MODEL.specs, seed=2)
DOCUMENTS = documents([8, 5, 9], seed=1)
RECORD = record([[DOCUMENTS[0], DOCUMENTS[1]], [DOCUMENTS[2]], []], 12)
# row 0: the first document has images from 2 and from 5 on, the second (positions 7 to 10) one from 8 on; row 1: one from 0 on
STARTS = np.array([[2, 5, 8], [0, 0, 0], [0, 0, 0]], np.int32)
OWNERS = np.array([[1, 1, 2], [1, 0, 0], [0, 0, 0]], np.int32)


def inputs(seed=0, rows=3, images=3):
    rng = np.random.default_rng(seed)
    return {
        "pixels": rng.integers(0, 5, (rows, images, 4, 4)).astype(np.int32),
        "starts": STARTS[:rows],
        "segments": OWNERS[:rows],
    }


def fresh(model, seed=0):
    return jax.jit(partial(spec.init, model.specs))(jax.random.key(seed))


def run(model, params, batch, given):
    return model.apply(params, batch["tokens"], segments=batch["segments"], context=model.encode(params, given))


HIDDEN = fast_jit(lambda p, pixels: run(MODEL, p, RECORD, {**inputs(), "pixels": pixels}).hidden)


@pytest.mark.parametrize("style", [LLAMA, GPT2])
def test_an_untrained_model_is_its_decoder_to_the_bit(style):
    c = replace(SMALL, decoder=style, every=1)
    model, text = flamingo.make(c), decoder.make(style)
    mine = fresh(model)
    own = weights(text.specs, seed=5)
    assert set(tree.flatten(own)) < set(tree.flatten(mine))
    params = {**mine, **own}
    looking = fast_jit(lambda p: run(model, p, RECORD, inputs()).hidden)(params)
    reading = fast_jit(lambda p: text.apply(p, RECORD["tokens"], segments=RECORD["segments"]).hidden)(own)
    np.testing.assert_array_equal(looking, reading)
    np.testing.assert_array_equal(model.head(params).kernel, text.head(own).kernel)


def test_a_token_sees_the_last_image_before_it_in_its_segment():
    seen = flamingo.Seen((), jnp.asarray(STARTS), jnp.asarray(OWNERS))
    index = jnp.broadcast_to(jnp.arange(12)[None, :], (3, 12))
    looks = np.asarray(flamingo.visible(seen, index, jnp.asarray(RECORD["segments"])))
    expected = np.zeros((3, 12, 3), bool)
    expected[0, 2:5, 0] = expected[0, 5:7, 1] = expected[0, 8:11, 2] = expected[1, :8, 0] = True
    np.testing.assert_array_equal(looks, expected)


def test_an_image_changes_what_sees_it_and_what_follows_in_its_segment():
    before = inputs()["pixels"]
    a = np.asarray(HIDDEN(PARAMS, before))
    for image, changed in ((0, range(2, 7)), (1, range(5, 7)), (2, range(8, 11))):
        after = before.copy()
        after[0, image] = (after[0, image] + 1) % 5
        b = np.asarray(HIDDEN(PARAMS, after))
        differs = np.abs(a - b).max(-1) > 1e-6
        expected = np.zeros((3, 12), bool)
        expected[0, list(changed)] = True
        np.testing.assert_array_equal(differs, expected)
    after = before.copy()
    after[1, 1:] = after[2] = 0  # not there: segment 0
    np.testing.assert_array_equal(a, HIDDEN(PARAMS, after))


def test_text_without_images_is_a_batch_whose_images_are_absent():
    without = fast_jit(lambda p: MODEL.apply(p, RECORD["tokens"], segments=RECORD["segments"]).hidden)(PARAMS)
    absent = fast_jit(lambda p: run(MODEL, p, RECORD, {**inputs(), "segments": np.zeros((3, 3), np.int32)}).hidden)(PARAMS)
    real = RECORD["segments"] != 0
    np.testing.assert_allclose(np.asarray(without)[real], np.asarray(absent)[real], rtol=1e-5, atol=1e-6)


def test_only_the_bridge_learns_and_frozen_leaves_do_not_move():
    params = {"policy": {**fresh(MODEL), **weights(TEXT.specs, seed=5)}}
    tx = optax.adam(0.1)
    state, frozen = init_state(params, tx, "^policy" + flamingo.BRIDGE)
    assert {p.split("/")[1] for p in tree.flatten(state.params)} == {"resampler", "cross_layers"}
    assert {p.split("/")[1] for p in tree.flatten(frozen)} == {"embed", "layers", "final_norm", "head", "vision"}
    step = fast_jit(make_train_step(lm.loss(MODEL, chunk=8), tx))
    batch = {**RECORD, "inputs": inputs()}
    first = state
    for _ in range(3):
        state, metrics = step(state, frozen, batch, jax.random.key(0))
    before, after = tree.flatten(first.params), tree.flatten(state.params)
    assert not [p for p in before if np.array_equal(before[p], after[p])]
    assert metrics["loss"].value() > 0


def test_at_the_start_only_the_gates_have_gradients():
    """tanh(0) hides what is behind a gate; the gates' own gradients open them."""
    params = {"policy": {**fresh(MODEL), **weights(TEXT.specs, seed=5)}}
    loss_fn = lm.loss(MODEL, chunk=8)
    grads = fast_jit(jax.grad(lambda p: loss_fn(p, {**RECORD, "inputs": inputs()}, None)[0].value()))(params)
    for path, g in tree.flatten(grads["policy"]).items():
        if path.startswith(("resampler", "vision")) or (path.startswith("cross") and not path.endswith("gate")):
            assert not np.asarray(g).any(), path
        if path.endswith("_gate"):
            assert np.asarray(g).all(), path


def test_prefill_and_decoding_equal_the_full_forward():
    """Right-padded prompts of unequal lengths, then one token at a time, with images that start inside and after the prompt."""
    lengths, steps = np.array([3, 6, 1]), 4
    tokens = np.stack(documents([10, 10, 10], seed=3))
    given = {**inputs(), "segments": np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]], np.int32)}
    prompts = np.where(np.arange(6)[None, :] < lengths[:, None], tokens[:, :6], 0)
    context = fast_jit(MODEL.encode)(PARAMS, given)
    full = np.asarray(fast_jit(lambda p, c: MODEL.apply(p, tokens, context=c).hidden)(PARAMS, context))
    apply = fast_jit(lambda p, t, s, cache, c: MODEL.apply(p, t, segments=s, cache=cache, context=c))
    out = apply(PARAMS, prompts, (prompts != 0).astype(np.int32), MODEL.init_cache(3, 10), context)
    assert out.cache.seen is not None  # later calls read the context from the cache
    for i, n in enumerate(lengths):
        np.testing.assert_allclose(out.hidden[i, :n], full[i, :n], rtol=1e-4, atol=1e-5)
    params = spec.unstack(PARAMS)
    for step in range(steps):
        here = lengths + step
        out = apply(params, tokens[np.arange(3), here][:, None], np.ones((3, 1), np.int32), out.cache, None)
        np.testing.assert_allclose(out.hidden[:, 0], full[np.arange(3), here], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(out.cache.length, lengths + steps)


def test_generation_is_the_argmax_of_full_forwards_that_see_the_images():
    lengths, new = np.array([2, 4, 3]), 5
    prompts = np.where(np.arange(4)[None, :] < lengths[:, None], np.stack(documents([4] * 3, seed=6)), 0)
    given = {**inputs(4), "segments": np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1]], np.int32)}
    greedy = partial(generate, MODEL, max_new_tokens=new, temperature=0.0)
    out = fast_jit(lambda p, given: greedy(p, prompts, lengths, jax.random.key(0), inputs=given).tokens)
    logits = fast_jit(lambda p, t, c: ops.logits(MODEL.head(p), MODEL.apply(p, t, context=c).hidden))
    found = []
    for pixels in (given["pixels"], 4 - given["pixels"]):
        context = fast_jit(MODEL.encode)(PARAMS, {**given, "pixels": pixels})
        tokens = np.pad(prompts, ((0, 0), (0, new))).astype(np.int32)
        rows = np.arange(3)
        for step in range(new):
            best = np.asarray(logits(PARAMS, tokens, context))[rows, lengths + step - 1].argmax(-1)
            tokens[rows, lengths + step] = best
        np.testing.assert_array_equal(out(PARAMS, {**given, "pixels": pixels}), tokens)
        found.append(tokens)
    assert (found[0] != found[1]).any(), "other images, other answers"


def test_features_in_place_of_pixels():
    """With vision None the batch brings what the encoder would have given."""
    bare = flamingo.make(replace(SMALL, vision=None))
    given = inputs()
    features = fast_jit(lambda p: flamingo.see(SMALL, p, given["pixels"].reshape(9, 4, 4)))(PARAMS).reshape(3, 3, 4, 8)
    params = {k: v for k, v in PARAMS.items() if k != "vision"}
    got = fast_jit(lambda p, f: run(bare, p, RECORD, {**given, "features": f}).hidden)(params, features)
    np.testing.assert_allclose(got, HIDDEN(PARAMS, given["pixels"]), rtol=1e-4, atol=1e-5)


def test_remat_changes_nothing():
    again = flamingo.make(replace(SMALL, decoder=replace(SMALL.decoder, remat="full")))
    batch = {**RECORD, "inputs": inputs()}

    def gradients(model):
        loss_fn = lm.loss(model, chunk=8)
        return fast_jit(jax.grad(lambda p: loss_fn({"policy": p}, batch, None)[0].value()))(PARAMS)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradients(MODEL), gradients(again))


def test_layer_inputs_are_those_of_the_decoders_layers():
    aux = fast_jit(lambda p: MODEL.apply(p, RECORD["tokens"], taps=("layer_inputs",)).aux)(fresh(MODEL))
    assert aux["layer_inputs"].shape == (3, 3, 12, SMALL.d_model)


def test_the_config_survives_json():
    again = families.from_dict(json.loads(json.dumps(families.to_dict(SMALL))))
    assert again == SMALL and families.make(again).config == SMALL


def test_counts():
    d, v = SMALL.d_model, SMALL.d_vision
    cross = 2 * 2 * d + 2 * d * d + 2 * v * d + 8 * d * d + 5 * d + 2
    latent = 3 * 2 * v + 4 * v * v + 8 * v * v + 5 * v
    resampler = (4 + 3) * v + 2 * latent + 2 * v
    vision = 4 * 5 * v + 4 * v + 2 * 2 * v + 4 * (v * v + v) + 8 * v * v + 5 * v + 2 * v
    assert flamingo.published_count(SMALL) == decoder.published_count(SMALL.decoder) + 2 * cross + resampler + vision


def test_the_published_bridge():
    """Flamingo-3B, table 5 of the paper: 1.2 B in gated cross-attention over a decoder of 1.4 B; a resampler of 194 M."""
    tree_of = flamingo.specs(flamingo.PRESETS["flamingo-3b"])
    assert spec.count(tree_of["cross_layers"]) == pytest.approx(1.2e9, rel=0.05)
    # its heads are wider there than d_vision / n_heads
    assert spec.count(tree_of["resampler"]) == pytest.approx(194e6, rel=0.15)
    assert decoder.published_count(flamingo.PRESETS["flamingo-3b"].decoder) == pytest.approx(1.4e9, rel=0.1)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"n_heads": 3}, "n_heads=3 does not divide"),
        ({"n_latents": 0}, "n_latents=0"),
        ({"n_patches": 5}, "n_patches=5"),
        ({"vision": replace(VISION, patch=3)}, "patches of 3 x 3"),
        ({"vision": replace(VISION, n_heads=3)}, "vision.n_heads=3"),
        ({"decoder": replace(LLAMA, mtp_layers=1)}, "layers of one kind"),
        ({"decoder": replace(LLAMA, n_heads=5)}, "n_heads=5"),
    ],
)
def test_what_cannot_be_built_is_refused(change, match):
    with pytest.raises(UserError, match=match):
        flamingo.make(replace(SMALL, **change))


def test_token_types_are_not_taken():
    with pytest.raises(ValueError, match="types"):
        MODEL.apply(PARAMS, RECORD["tokens"], types=RECORD["tokens"])
