"""Every dense decoder family equals transformers': logits, gradients, generation, and weights both ways."""

import functools

import pytest

from tests.oracle import published

pytestmark = pytest.mark.oracle
pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BASE = dict(
    vocab_size=50, hidden_size=20, intermediate_size=28, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
GPT2 = dict(
    vocab_size=50, n_positions=64, n_embd=16, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=100.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=16)
LINEAR = dict(rope_type="linear", rope_theta=100.0, factor=2.0)
SEED = 1  # of weights with which no model repeats one token for ever
S, F = "sliding_attention", "full_attention"

# name -> (model class, config class, settings): head widths that are not hidden_size / heads, one kv head, tied and untied
CASES = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt2, untied, wide, erf": (
        "GPT2LMHeadModel", "GPT2Config", {**GPT2, "n_inner": 24, "activation_function": "gelu", "tie_word_embeddings": False}
    ),
    "llama 3": ("LlamaForCausalLM", "LlamaConfig", {**BASE, "head_dim": 6, "rope_parameters": LLAMA3}),
    "llama, biases, tied, one kv head": (
        "LlamaForCausalLM", "LlamaConfig",
        {**BASE, "hidden_size": 16, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True,
         "tie_word_embeddings": True, "rope_parameters": LINEAR},
    ),
    "llama, yarn": ("LlamaForCausalLM", "LlamaConfig", {**BASE, "head_dim": 8, "rope_parameters": YARN}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**BASE, "head_dim": 6, "num_key_value_heads": 1, "sliding_window": 4}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**BASE, "hidden_size": 16}),
    "qwen2, tied, windows from layer 1": (
        "Qwen2ForCausalLM", "Qwen2Config",
        {**BASE, "hidden_size": 16, "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 4,
         "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**BASE, "head_dim": 8, "attention_bias": True}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**BASE, "head_dim": 8, "num_key_value_heads": 1}),
    "gemma2": (
        "Gemma2ForCausalLM", "Gemma2Config", {**BASE, "head_dim": 8, "query_pre_attn_scalar": 24, "sliding_window": 4}
    ),
    "gemma3": (
        "Gemma3ForCausalLM", "Gemma3TextConfig",
        {**BASE, "num_hidden_layers": 5, "head_dim": 8, "query_pre_attn_scalar": 24, "sliding_window": 4,
         "layer_types": [S, S, F, S, S], "rope_parameters": {F: LINEAR, S: {"rope_type": "default", "rope_theta": 30.0}}},
    ),
}  # fmt: skip


@functools.cache
def made(name, directory):
    model, config, settings = CASES[name]
    return published.pair(lambda: getattr(transformers, model)(getattr(transformers, config)(**settings)), directory, seed=SEED)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return functools.cache(lambda name: tmp_path_factory.mktemp("published"))


@pytest.fixture(params=CASES)
def pair(request, directories):
    return made(request.param, directories(request.param))


def test_logits(pair):
    published.check_logits(pair)


def test_gradients(pair, tmp_path):
    published.check_gradients(pair, tmp_path)


def test_greedy_tokens(pair):
    published.check_generation(pair)


def test_weights_back_to_transformers(pair, tmp_path):
    published.check_export(pair, tmp_path / "export")
