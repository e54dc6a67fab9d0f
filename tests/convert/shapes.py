"""One tiny config of every decoder that is published under a name of its own, and random weights for them."""

from dataclasses import replace

from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.layers import RopeScaling
from jaxllm.models.mla import MLAConfig
from jaxllm.models.moe import MoEConfig

LLAMA = DecoderConfig(
    vocab_size=50, max_length=32, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=24, tied=False,
    rope_theta=100.0, norm_eps=1e-6,
)  # fmt: skip
GEMMA = replace(
    LLAMA, norm="rmsnorm_offset", activation="geglu", embed_scale=True, tied=True, attention_scale=24**-0.5, sandwich_norms=True
)
LATENT = replace(LLAMA, n_kv_heads=None, head_dim=None, n_layers=3, dense_layers=1)

CONFIGS = {
    "GPT2LMHeadModel": DecoderConfig(
        vocab_size=50, max_length=32, d_model=16, n_layers=2, n_heads=2, d_ff=32, positions="learned", norm="layernorm",
        activation="gelu", bias=True,
    ),
    "LlamaForCausalLM": replace(LLAMA, rope_scaling=RopeScaling("llama3", 4.0, 16, low_factor=1.0, high_factor=4.0)),
    "MistralForCausalLM": replace(LLAMA, windows=(4,)),
    "Qwen2ForCausalLM": replace(LLAMA, qkv_bias=True),
    "Qwen3ForCausalLM": replace(LLAMA, qk_norm=True, n_kv_heads=1),
    "GemmaForCausalLM": replace(GEMMA, attention_scale=None, sandwich_norms=False),
    "Gemma2ForCausalLM": replace(GEMMA, n_layers=3, windows=(4, 0), attention_softcap=50.0, final_softcap=30.0),
    "Gemma3ForCausalLM": replace(
        GEMMA, n_layers=4, windows=(4, 4, 0), local_rope_theta=50.0, qk_norm=True, rope_scaling=RopeScaling("linear", 8.0)
    ),
    "MixtralForCausalLM": replace(LLAMA, moe=MoEConfig(4, 2, 24)),
    "Qwen3MoeForCausalLM": replace(LLAMA, qk_norm=True, n_layers=3, dense_layers=1, moe=MoEConfig(4, 2, 12, normalise=False)),
    "DeepseekV2ForCausalLM": replace(
        LATENT, mla=MLAConfig(None, 8, 6, 4, 5), moe=MoEConfig(8, 3, 12, n_shared=2, normalise=False, scale=1.5)
    ),
    "DeepseekV3ForCausalLM": replace(
        LATENT, mla=MLAConfig(10, 8, 6, 4, 5), mtp_layers=1,
        rope_scaling=RopeScaling("yarn", 4.0, 8, beta_fast=8.0, mscale=1.0, mscale_all_dim=0.8),
        moe=MoEConfig(
            8, 3, 12, n_shared=1, scoring="sigmoid", scale=2.5, n_groups=4, topk_groups=2, group_score="top2", bias=True
        ),
    ),
}  # fmt: skip
