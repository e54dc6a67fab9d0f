"""ImageGPT against transformers: logits, gradients, sampling order, and both directions of the files."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.convert import hf
from jaxllm.core import ops
from jaxllm.core.types import UserError
from jaxllm.generate.decode import generate
from jaxllm.losses import lm
from tests.models.tiny import fast_jit
from tests.oracle.parity import agree

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

COLOURS, LENGTH = 20, 16
SETTINGS = {
    "usual": {},
    "odd": {"n_embd": 30, "n_head": 3, "n_inner": 44, "n_layer": 3, "activation_function": "gelu_new"},
}


@pytest.fixture(scope="module", params=list(SETTINGS))
def pair(request, tmp_path_factory):
    """(reference, our model, our params, its directory): every weight random, no bias 0, no scale 1."""
    config = transformers.ImageGPTConfig(
        **{"vocab_size": COLOURS + 1, "n_positions": LENGTH, "n_embd": 16, "n_layer": 2, "n_head": 2, **SETTINGS[request.param]},
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=COLOURS, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    reference = transformers.ImageGPTForCausalImageModeling(config).eval()
    with torch.no_grad():
        for name, p in reference.named_parameters():
            p.copy_((1.0 if ".ln_" in name else 0.0) + 0.3 * torch.randn_like(p))
    path = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(path)
    return reference, *hf.load(path), path


def sequences(rows=3, length=LENGTH, seed=0):
    rng = np.random.default_rng(seed)
    return np.concatenate([np.full((rows, 1), COLOURS), rng.integers(0, COLOURS, (rows, length - 1))], axis=1).astype(np.int32)


def ours(model, params, tokens):
    return fast_jit(lambda p, t: ops.logits(model.head(p), model.apply(p, t).hidden))(params, tokens)


def test_logits_have_one_column_a_colour_and_equal_theirs(pair):
    reference, model, params, _ = pair
    for length in (LENGTH, 5):
        tokens = sequences(length=length)
        theirs = reference(torch.tensor(tokens.astype(np.int64))).logits.detach().numpy()
        mine = np.asarray(ours(model, params, tokens))
        assert mine.shape == theirs.shape == (3, length, COLOURS)
        agree("ImageGPTForCausalImageModeling", "logits", mine, theirs, 1e-4)


def test_hidden_states_by_layer_equal_theirs(pair):
    reference, model, params, _ = pair
    tokens = sequences()
    theirs = reference(torch.tensor(tokens.astype(np.int64)), output_hidden_states=True).hidden_states
    out = fast_jit(lambda p: model.apply(p, tokens, taps=("layer_inputs",)))(params)
    for n in range(model.config.n_layers):
        np.testing.assert_allclose(out.aux["layer_inputs"][n], theirs[n].detach(), rtol=1e-3, atol=1e-4)


def test_gradients_equal_theirs(pair):
    reference, model, params, _ = pair
    tokens, targets = sequences(), np.roll(sequences(seed=4), -1, axis=1) % COLOURS
    batch = {"tokens": tokens, "targets": targets, "segments": np.ones_like(tokens), "mask": np.ones(tokens.shape, bool)}
    loss_fn = lm.loss(model)
    grads = fast_jit(jax.grad(lambda p: loss_fn({"policy": p}, batch, None)[0].value()))(params)
    logits = reference(torch.tensor(tokens.astype(np.int64))).logits
    reference.zero_grad()
    torch.nn.functional.cross_entropy(logits.reshape(-1, COLOURS), torch.tensor(targets.astype(np.int64)).reshape(-1)).backward()
    theirs = {name: p.grad.numpy() for name, p in reference.named_parameters()}
    d = model.config.d_model
    attention, layers = grads["layers"]["attention"], grads["layers"]
    qkv = [np.asarray(attention[n]["kernel"][1]).reshape(d, d) for n in "qkv"]
    pairs = {
        "transformer.wte.weight": grads["embed"]["tokens"][: COLOURS + 1],
        "transformer.wpe.weight": grads["embed"]["positions"],
        "transformer.h.1.attn.c_attn.weight": np.concatenate(qkv, axis=1),
        "transformer.h.0.attn.c_proj.bias": attention["o"]["bias"][0],
        "transformer.h.1.mlp.c_fc.weight": layers["ffn"]["up"]["kernel"][1],
        "transformer.h.0.ln_2.weight": layers["ffn_norm"]["scale"][0],
        "transformer.ln_f.weight": grads["final_norm"]["scale"],
        "lm_head.weight": np.asarray(grads["head"]["kernel"]).T[:COLOURS],
    }
    for name, mine in pairs.items():
        assert np.abs(theirs[name]).max() > 1e-5, name
        agree("ImageGPTForCausalImageModeling", "gradients", mine, theirs[name], 1e-3)


def test_greedy_pixels_are_theirs(pair):
    """The colour that the full forward likes best, pixel by pixel; transformers' generate stops at what it takes for an end."""
    reference, model, params, _ = pair
    tokens = torch.tensor(sequences(rows=2, length=3).astype(np.int64))
    prompts = tokens.numpy().astype(np.int32)
    while tokens.shape[1] < LENGTH:
        best = reference(tokens).logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, best], dim=1)
    sample = fast_jit(partial(generate, model, max_new_tokens=LENGTH - 3, temperature=0.0))
    out = sample(params, jnp.asarray(prompts), jnp.array([3, 3]), jax.random.key(0))
    np.testing.assert_array_equal(out.tokens, tokens.numpy())
    assert int(out.tokens[:, 3:].max()) < COLOURS


def test_what_is_saved_loads_in_transformers_and_bit_for_bit_here(pair, tmp_path):
    reference, model, params, _ = pair
    hf.save(tmp_path / "out", model, params, None)
    back = transformers.ImageGPTForCausalImageModeling.from_pretrained(tmp_path / "out").eval()
    tokens = torch.tensor(sequences().astype(np.int64))
    np.testing.assert_array_equal(back(tokens).logits.detach(), reference(tokens).logits.detach())
    again, weights = hf.load(tmp_path / "out")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, weights, params)


def test_what_is_not_supported_is_named(pair, tmp_path):
    import json
    import shutil

    _, _, _, path = pair
    shutil.copytree(path, tmp_path / "bad")
    config = json.loads((path / "config.json").read_text())
    (tmp_path / "bad" / "config.json").write_text(json.dumps({**config, "scale_attn_by_inverse_layer_idx": True}))
    with pytest.raises(UserError, match="scale_attn_by_inverse_layer_idx"):
        hf.load(tmp_path / "bad")
