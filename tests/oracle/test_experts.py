"""Every published mixture of experts equals transformers': routing, latent attention, and weights both ways."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.convert import hf, safetensors
from jaxllm.models import families
from tests.convert.shapes import CONFIGS
from tests.models.tiny import fast_jit, weights
from tests.oracle import published

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BASE = dict(
    vocab_size=50, hidden_size=20, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
DEEPSEEK = dict(
    num_key_value_heads=4, moe_intermediate_size=12, n_routed_experts=8, num_experts_per_tok=3, first_k_dense_replace=1,
    kv_lora_rank=10, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=5,
)  # fmt: skip
YARN = dict(
    rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=0.8,
    beta_fast=8.0, beta_slow=1.0,
)  # fmt: skip
CASES = {
    "mixtral": (
        "MixtralForCausalLM", "MixtralConfig", {**BASE, "head_dim": 6, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "qwen3 moe": (
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig",
        {**BASE, "head_dim": 8, "moe_intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True},
    ),
    "qwen3 moe, first layer dense, weights as they are": (
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig",
        {**BASE, "head_dim": 8, "moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0],
         "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "deepseek v2, greedy": (
        "DeepseekV2ForCausalLM", "DeepseekV2Config",
        {**BASE, **DEEPSEEK, "q_lora_rank": 12, "n_shared_experts": 1, "rope_parameters": YARN},
    ),
    "deepseek v2, groups, direct queries": (
        "DeepseekV2ForCausalLM", "DeepseekV2Config",
        {**BASE, **DEEPSEEK, "q_lora_rank": None, "n_shared_experts": 2, "n_group": 4, "topk_group": 2,
         "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5},
    ),
    "deepseek v3": (
        "DeepseekV3ForCausalLM", "DeepseekV3Config",
        {**BASE, **DEEPSEEK, "num_hidden_layers": 3, "q_lora_rank": 12, "n_shared_experts": 1, "n_group": 4, "topk_group": 2,
         "rope_parameters": YARN},
    ),
    "deepseek v3, one group, no dense layer": (
        "DeepseekV3ForCausalLM", "DeepseekV3Config",
        {**BASE, **DEEPSEEK, "q_lora_rank": None, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
         "first_k_dense_replace": 0, "norm_topk_prob": False},
    ),
}  # fmt: skip


@functools.cache
def made(name, directory):
    model, config, settings = CASES[name]
    return published.pair(lambda: getattr(transformers, model)(getattr(transformers, config)(**settings)), directory, seed=1)


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


def module_weights(directory, layer):
    """The state of transformers' MtpModel from the tensors of a published layer behind the last: experts are joined there."""
    prefix = f"model.layers.{layer}."
    found = {n: torch.tensor(safetensors.view(t)) for n, t in safetensors.scan(directory).items() if n.startswith(prefix)}
    found = {n.removeprefix(prefix): t for n, t in found.items()}
    own = {"enorm.weight": "enorm.weight", "hnorm.weight": "hnorm.weight", "eh_proj.weight": "eh_proj.weight",
           "shared_head.norm.weight": "post_norm.weight"}  # fmt: skip
    experts = range(sum(n.startswith("mlp.experts.") and n.endswith("gate_proj.weight") for n in found))
    gate, up, down = (
        torch.stack([found.pop(f"mlp.experts.{e}.{name}_proj.weight") for e in experts]) for name in ("gate", "up", "down")
    )
    found |= {"mlp.experts.gate_up_proj": torch.cat([gate, up], dim=1), "mlp.experts.down_proj": down}
    return {f"layers.0.{own.get(n, 'mtp_block.' + n)}": t for n, t in found.items()}


def test_multi_token_prediction(tmp_path):
    """The module of DeepSeek-V3 that predicts two tokens ahead, as transformers drafts with it, from our export."""
    modeling_layers = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(modeling_layers, "MtpModel"):
        pytest.skip("this transformers has no such modules")
    config = CONFIGS["DeepseekV3ForCausalLM"]
    model = families.make(config)
    params = weights(model.specs)
    hf.save(tmp_path / "a", model, params)
    main = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "a").eval()
    main.set_attn_implementation("eager")
    modules = modeling_layers.MtpModel(main, 1).eval()
    missing, unknown = modules.load_state_dict(module_weights(tmp_path / "a", config.n_layers), strict=False)
    assert not unknown and all(n.startswith(("embed_tokens", "shared_head")) for n in missing), (missing, unknown)
    ids = published.tokens((2, 12))
    with torch.no_grad():
        hidden = main.model(torch.tensor(ids)).last_hidden_state[:, :-1]
        positions = torch.arange(1, 12)[None].expand(2, -1)
        want = modules.forward_layer(0, hidden, positions, None, input_ids=torch.tensor(ids[:, 1:])).numpy()
    got = fast_jit(lambda p, x: model.apply(p, x, taps=("mtp",)).aux["mtp"])(params, jnp.asarray(ids))
    published.close(np.asarray(got)[0][:, :-1], want, 1e-4, "hidden states of the module")
