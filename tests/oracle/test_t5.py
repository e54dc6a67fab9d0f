"""Parity of the encoder-decoder with transformers through published directories: T5 v1.0, v1.1 and what stands between."""

import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.convert import hf
from jaxllm.core import ops
from jaxllm.core.tree import flatten
from jaxllm.generate.decode import generate
from jaxllm.losses import lm
from jaxllm.models import relative
from tests.models.tiny import fast_jit
from tests.oracle.parity import agree

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

V, S, L = 50, 14, 9
BASE = {
    "vocab_size": V, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 3, "dropout_rate": 0.0,
    "decoder_start_token_id": 0, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 10,
}  # fmt: skip
# settings, and whether the head is a matrix of its own
FORMS = {
    "v1.0": ({}, False),
    "v1.1": ({"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, True),
    "new": ({"feed_forward_proj": "gated-silu", "tie_word_embeddings": False, "num_decoder_layers": 1}, False),
    "odd": ({"num_heads": 5, "d_kv": 3, "num_decoder_layers": 3, "decoder_start_token_id": 7}, True),
}
RNG = np.random.default_rng(0)
LENGTHS, TARGET_LENGTHS = np.array([14, 9, 3]), np.array([9, 4, 6])
INPUTS = {
    "segments": (np.arange(S)[None] < LENGTHS[:, None]).astype(np.int32),
    "tokens": RNG.integers(1, V, (3, S)).astype(np.int32),
}
MASK = np.arange(L)[None] < TARGET_LENGTHS[:, None]
TOKENS, TARGETS = (RNG.integers(1, V, (3, L)).astype(np.int32) for _ in range(2))
RECORD = {"inputs": INPUTS, "tokens": TOKENS, "targets": TARGETS, "segments": MASK.astype(np.int32), "mask": MASK}


def long(x):
    return torch.tensor(np.asarray(x)).long()


def reference(name):
    """A random model of transformers: no scale is 1, and the head is its own where the form says so."""
    settings, own_head = FORMS[name]
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**{**BASE, **settings})).eval()
    if own_head:
        model.lm_head.weight = torch.nn.Parameter(torch.zeros(V, 16))
    spread = {"shared": 0.05, "relative_attention_bias": 3.0, "Attention": 0.5}  # greedy answers that are not one token again
    with torch.no_grad():
        for path, p in model.named_parameters():
            scale = next((s for part, s in spread.items() if part in path), 0.3)
            p.copy_((1.0 if path.endswith("norm.weight") else 0.0) + scale * torch.randn_like(p))
    return model


@pytest.fixture(scope="module", params=list(FORMS))
def pair(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("t5")
    theirs = reference(request.param)
    theirs.save_pretrained(path / "theirs")
    model, params = hf.load(path / "theirs")
    return SimpleNamespace(name=request.param, path=path, theirs=theirs, model=model, params=params)


def run(pair, **more):
    return pair.theirs(
        input_ids=long(INPUTS["tokens"]), attention_mask=long(INPUTS["segments"]), decoder_input_ids=long(TOKENS),
        decoder_attention_mask=long(MASK), **more,
    )  # fmt: skip


def close(a, b, tolerance=1e-4):
    a, b = np.asarray(a), np.asarray(b.detach().numpy() if hasattr(b, "detach") else b)
    assert np.abs(a - b).max() < tolerance * max(1, np.abs(b).max())


def test_logits_states_and_layers_under_padding(pair):
    def ours(params):
        context = pair.model.encode(params, INPUTS)
        out = pair.model.apply(params, TOKENS, segments=RECORD["segments"], context=context, taps=("layer_inputs",))
        return context.states, out.aux["layer_inputs"], ops.logits(pair.model.head(params), out.hidden)

    with torch.no_grad():
        theirs = run(pair, output_hidden_states=True)
    states, layers, logits = fast_jit(ours)(pair.params)
    real = INPUTS["segments"] != 0
    close(states[real], theirs.encoder_last_hidden_state[torch.tensor(real)])
    for a, b in zip(layers, theirs.decoder_hidden_states, strict=False):
        close(a[MASK], b[torch.tensor(MASK)])
    assert logits.shape == (3, L, V)
    agree("T5ForConditionalGeneration", "logits", logits[MASK], theirs.logits[torch.tensor(MASK)], 1e-4)


def test_the_config_is_read(pair):
    settings, own_head = FORMS[pair.name]
    c = pair.model.config
    assert c.tied != own_head and c.scales == (settings.get("tie_word_embeddings") is not False)
    assert c.activation == {"gated-gelu": "geglu", "gated-silu": "swiglu"}.get(settings.get("feed_forward_proj"), "relu")
    assert (c.decoder_layers, c.start_id) == (settings.get("num_decoder_layers", 2), settings.get("decoder_start_token_id", 0))


def test_gradients_of_every_weight(pair):
    loss_fn = lm.loss(pair.model)
    value, grads = fast_jit(jax.value_and_grad(lambda p: loss_fn({"policy": p}, RECORD, None)[0].value()))(pair.params)
    labels = torch.where(torch.tensor(MASK), long(TARGETS), -100)
    loss = torch.nn.functional.cross_entropy(run(pair).logits.flatten(0, 1), labels.flatten())
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    before = {k: v.clone() for k, v in pair.theirs.state_dict().items()}
    pair.theirs.zero_grad()
    loss.backward()
    with torch.no_grad():
        for p in pair.theirs.parameters():
            p.copy_(p.grad)
    pair.theirs.save_pretrained(pair.path / "gradients")
    pair.theirs.load_state_dict(before)
    wanted = flatten(hf.load(pair.path / "gradients")[1])
    assert wanted.keys() == flatten(grads).keys() and len(wanted) >= 25
    for path, grad in flatten(grads).items():
        expected = np.asarray(wanted[path])
        assert np.abs(expected).max() > 0, path
        agree("T5ForConditionalGeneration", "gradients", grad, expected, 1e-3)


def test_greedy_generation_is_that_of_transformers(pair):
    pair.theirs.generation_config.eos_token_id = None
    start = pair.model.config.start_id
    with torch.no_grad():
        expected = pair.theirs.generate(
            long(INPUTS["tokens"]),
            attention_mask=long(INPUTS["segments"]),
            max_new_tokens=32,
            do_sample=False,
            num_beams=1,
            use_cache=False,  # theirs fails when encoder and decoder differ in depth
        ).numpy()
    fn = fast_jit(lambda p, inputs: generate(
        pair.model, p, jnp.full((3, 1), start), jnp.ones(3, jnp.int32), jax.random.key(0), max_new_tokens=32, temperature=0.0,
        inputs=inputs,
    ).tokens)  # fmt: skip
    got = np.asarray(fn(pair.params, INPUTS))
    np.testing.assert_array_equal(got, expected)
    assert got.shape == (3, 33) and len(np.unique(got)) > 5
    wide = {k: np.pad(v, ((0, 0), (0, 5)), constant_values=9 * (k == "tokens")) for k, v in INPUTS.items()}
    np.testing.assert_array_equal(fn(pair.params, wide), got)


def test_export_reloads_there_and_here(pair):
    target = pair.path / "ours"
    assert hf.save(target, pair.model, pair.params) == "T5ForConditionalGeneration"
    again = transformers.T5ForConditionalGeneration.from_pretrained(target).eval()
    assert again.config.scale_decoder_outputs == pair.model.config.scales
    with torch.no_grad():
        a, b = run(pair).logits, run(SimpleNamespace(theirs=again)).logits
    np.testing.assert_array_equal(a.numpy(), b.numpy())
    model, params = hf.load(target)
    assert model.config == pair.model.config
    jax.tree.map(np.testing.assert_array_equal, params, pair.params)
    assert (target / "model.safetensors").stat().st_size < 1.1 * (pair.path / "theirs" / "model.safetensors").stat().st_size


def test_older_files_are_read_too(pair, tmp_path):
    """Before transformers 5: one flag for both questions, copies of the embedding, a bias that was never used."""
    import json

    from safetensors.numpy import load_file, save_file

    published = json.loads((pair.path / "theirs" / "config.json").read_text())
    scaled = published.pop("scale_decoder_outputs")
    tensors = load_file(pair.path / "theirs" / "model.safetensors")
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    tensors["decoder.embed_tokens.weight"] = tensors["encoder.embed_tokens.weight"].copy()
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    tensors[unused] = np.zeros((8, published["num_heads"]), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**published, "tie_word_embeddings": scaled}))
    model, params = hf.load(tmp_path)
    assert model.config == pair.model.config
    jax.tree.map(np.testing.assert_array_equal, params, pair.params)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("n,far", [(32, 128), (8, 10)])
def test_buckets_are_those_of_transformers(bidirectional, n, far):
    from transformers.models.t5.modeling_t5 import T5Attention

    positions = np.arange(-700, 701)
    expected = T5Attention._relative_position_bucket(torch.tensor(positions), bidirectional, n, far).numpy()
    got = relative.bucket(jnp.asarray(positions), bidirectional=bidirectional, buckets=n, max_distance=far)
    np.testing.assert_array_equal(got, expected)
