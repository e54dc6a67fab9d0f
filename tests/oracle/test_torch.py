"""Parity with PyTorch and transformers through copied weights: forward, gradients, generation, optimizer."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core import ops
from jaxllm.generate.decode import generate
from jaxllm.generate.sampling import warp
from jaxllm.losses import lm
from jaxllm.models import decoder
from jaxllm.models.decoder import DecoderConfig
from jaxllm.train import optim
from tests.models.tiny import documents, fast_jit

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

V, D, N, H, K, FF, LENGTH = 50, 16, 2, 4, 4, 24, 12


def array(t):
    return jnp.asarray(t.detach().numpy())


def layers(model, names):
    """Stacked arrays from per-layer modules. names: path -> fn(layer) -> tensor."""
    tree = {}
    for path, fn in names.items():
        node = tree
        *parents, last = path.split("/")
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = jnp.stack([array(fn(layer)) for layer in model])
    return tree


def pad(t):
    """[V, ...] to the vocabulary that is held in memory, the new rows loud: they must never be seen."""
    x = np.asarray(t.detach().numpy())
    return jnp.asarray(np.concatenate([x, np.full((128 - len(x), *x.shape[1:]), 3.0, np.float32)]))


def noise(model, seed=0):
    """Every weight random: no bias 0, no scale 1."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            one = 1.0 if p.ndim == 1 and name.endswith("weight") else 0.0
            p.copy_(one + 0.3 * torch.randn_like(p))
    return model.eval()


def make_gpt2():
    reference = noise(transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=V, n_positions=32, n_embd=D, n_layer=N, n_head=H, n_inner=FF,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )))  # fmt: skip
    config = DecoderConfig(
        vocab_size=V, max_length=32, d_model=D, n_layers=N, n_heads=H, d_ff=FF, positions="learned",
        norm="layernorm", activation="gelu", bias=True, tied=True,
    )  # fmt: skip

    def qkv(i):
        return {
            f"attention/{'qkv'[i]}/kernel": lambda m: m.attn.c_attn.weight.split(D, 1)[i].reshape(D, H, K),
            f"attention/{'qkv'[i]}/bias": lambda m: m.attn.c_attn.bias.split(D)[i].reshape(H, K),
        }

    def convert(m):
        t = m.transformer
        names = qkv(0) | qkv(1) | qkv(2) | {
            "attention_norm/scale": lambda m: m.ln_1.weight, "attention_norm/bias": lambda m: m.ln_1.bias,
            "attention/o/kernel": lambda m: m.attn.c_proj.weight.reshape(H, K, D),
            "attention/o/bias": lambda m: m.attn.c_proj.bias,
            "ffn_norm/scale": lambda m: m.ln_2.weight, "ffn_norm/bias": lambda m: m.ln_2.bias,
            "ffn/up/kernel": lambda m: m.mlp.c_fc.weight, "ffn/up/bias": lambda m: m.mlp.c_fc.bias,
            "ffn/down/kernel": lambda m: m.mlp.c_proj.weight, "ffn/down/bias": lambda m: m.mlp.c_proj.bias,
        }  # fmt: skip
        return {
            "embed": {"tokens": pad(t.wte.weight), "positions": array(t.wpe.weight)},
            "layers": layers(t.h, names),
            "final_norm": {"scale": array(t.ln_f.weight), "bias": array(t.ln_f.bias)},
        }

    return reference, decoder.make(config), convert


def make_llama(tied):
    g = 2
    reference = noise(transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=V, max_position_embeddings=32, hidden_size=D, num_hidden_layers=N, num_attention_heads=H,
        num_key_value_heads=g, intermediate_size=FF, rms_norm_eps=1e-5, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )))  # fmt: skip
    config = DecoderConfig(
        vocab_size=V,
        max_length=32,
        d_model=D,
        n_layers=N,
        n_heads=H,
        n_kv_heads=g,
        d_ff=FF,
        tied=tied,
        rope_theta=500.0,
    )

    def convert(m):
        t = m.model
        names = {
            "attention_norm/scale": lambda m: m.input_layernorm.weight,
            "attention/q/kernel": lambda m: m.self_attn.q_proj.weight.T.reshape(D, H, K),
            "attention/k/kernel": lambda m: m.self_attn.k_proj.weight.T.reshape(D, g, K),
            "attention/v/kernel": lambda m: m.self_attn.v_proj.weight.T.reshape(D, g, K),
            "attention/o/kernel": lambda m: m.self_attn.o_proj.weight.T.reshape(H, K, D),
            "ffn_norm/scale": lambda m: m.post_attention_layernorm.weight,
            "ffn/gate/kernel": lambda m: m.mlp.gate_proj.weight.T,
            "ffn/up/kernel": lambda m: m.mlp.up_proj.weight.T,
            "ffn/down/kernel": lambda m: m.mlp.down_proj.weight.T,
        }
        params = {
            "embed": {"tokens": pad(t.embed_tokens.weight)},
            "layers": layers(t.layers, names),
            "final_norm": {"scale": array(t.norm.weight)},
        }
        return params if tied else params | {"head": {"kernel": pad(m.lm_head.weight).T}}

    return reference, decoder.make(config), convert


MAKERS = {
    "gpt2": make_gpt2,
    "llama-untied": lambda: make_llama(False),
    "llama-tied": lambda: make_llama(True),
}


@pytest.fixture(scope="module", params=list(MAKERS))
def pair(request):
    """(the reference, our model, a function from the reference's weights to ours)."""
    return MAKERS[request.param]()


TOKENS = np.stack(documents([LENGTH + 1] * 3, seed=8))


def gradients_as_modules(reference):
    """The reference with its weights replaced by their gradients, to go through the same conversion."""
    with torch.no_grad():
        for p in reference.parameters():
            p.copy_(p.grad)
    return reference


def test_logits_and_gradients_are_those_of_transformers(pair):
    reference, model, convert = pair
    params = convert(reference)
    batch = {
        "tokens": TOKENS[:, :-1], "targets": TOKENS[:, 1:], "segments": np.ones((3, LENGTH), np.int32),
        "mask": np.ones((3, LENGTH), bool),
    }  # fmt: skip
    out = reference(torch.tensor(batch["tokens"]).long())

    def loss(params):
        hidden = model.apply(params, batch["tokens"]).hidden
        mean = lm.loss(model, chunk=12)({"policy": params}, batch, None)[0]
        return mean.value(), ops.logits(model.head(params), hidden)

    (value, logits), grads = fast_jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(logits, out.logits.detach().numpy(), rtol=1e-4, atol=1e-4)
    expected = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), torch.tensor(batch["targets"]).long().flatten())
    assert float(value) == pytest.approx(expected.item(), rel=1e-5)
    before = {k: v.clone() for k, v in reference.state_dict().items()}
    reference.zero_grad()
    expected.backward()
    wanted = convert(gradients_as_modules(reference))
    reference.load_state_dict(before)
    for tree in (
        grads,
        wanted,
    ):  # the padded rows of the vocabulary have no gradient here and do not exist there
        tree["embed"]["tokens"] = tree["embed"]["tokens"][:V]
        if "head" in tree:
            tree["head"]["kernel"] = tree["head"]["kernel"][:, :V]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), grads, wanted)


def test_greedy_generation_is_that_of_transformers(pair):
    reference, model, convert = pair
    prompts = TOKENS[:, :5]
    with torch.no_grad():
        expected = reference.generate(
            torch.tensor(prompts).long(), attention_mask=torch.ones(3, 5), max_new_tokens=10, do_sample=False
        ).numpy()
    fn = fast_jit(lambda p: generate(
        model, p, jnp.asarray(prompts), jnp.full(3, 5), jax.random.key(0), max_new_tokens=10, temperature=0.0
    ).tokens)  # fmt: skip
    np.testing.assert_array_equal(fn(convert(reference)), expected)


@pytest.mark.parametrize("temperature,top_k,top_p", [(0.7, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.8), (1.3, 10, 0.6), (0.5, 3, 0.99)])
def test_warping_is_that_of_transformers(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(0, 2, (32, 40)).astype(np.float32)
    scores = torch.tensor(logits)
    processors = [transformers.TemperatureLogitsWarper(temperature)]
    processors += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    processors += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
    for processor in processors:
        scores = processor(None, scores)
    got = warp(jnp.asarray(logits), temperature=temperature, top_k=top_k, top_p=top_p)
    np.testing.assert_allclose(got, scores.numpy(), rtol=1e-5)
    assert np.isinf(got).any() == bool(top_k or top_p < 1)


def test_adamw_with_clipping_is_that_of_torch():
    rng = np.random.default_rng(0)
    start = {
        "q": {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)},
        "norm": {"scale": rng.normal(size=3)},
    }
    start = jax.tree.map(lambda x: x.astype(np.float32), start)
    theirs = jax.tree.map(lambda x: torch.nn.Parameter(torch.tensor(x)), start)
    decayed, others = [theirs["q"]["kernel"]], [theirs["q"]["bias"], theirs["norm"]["scale"]]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.02, betas=(0.9, 0.95), eps=1e-8)
    tx = optim.adamw(0.02, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0)
    ours = jax.tree.map(jnp.asarray, start)
    state, update = jax.jit(tx.init)(ours), jax.jit(tx.update)
    for size in (10.0, 1.0, 0.1):  # clipped, clipped, not clipped
        grads = jax.tree.map(lambda x: rng.normal(0, 1, x.shape).astype(np.float32), start)
        grads = {k: {n: size * x for n, x in v.items()} for k, v in grads.items()}
        for p, g in zip(jax.tree.leaves(theirs), jax.tree.leaves(grads), strict=True):
            p.grad = torch.tensor(g)
        torch.nn.utils.clip_grad_norm_(decayed + others, 1.0)
        optimizer.step()
        updates, state = update(grads, state, ours)
        ours = jax.tree.map(jnp.add, ours, updates)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b.detach().numpy(), rtol=1e-4, atol=1e-5), ours, theirs)
