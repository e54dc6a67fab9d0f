"""Adapters in PEFT's format: peft loads what we write, we load what peft wrote, and the logits are equal."""

import copy
import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.adapt import lora
from jaxllm.convert import peft as ours
from jaxllm.core import ops
from jaxllm.core.tree import flatten
from jaxllm.core.types import UserError
from tests.models.tiny import fast_jit, weights
from tests.oracle import parity, published
from tests.oracle.test_decoders import BASE, GPT2
from tests.oracle.test_experts import CASES as EXPERTS

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

T5 = dict(vocab_size=50, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
MODELS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**BASE, "head_dim": 6, "attention_bias": True}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**BASE, "head_dim": 8, "num_key_value_heads": 1}),
    "deepseek": EXPERTS["deepseek v3"],
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
}
# (model, our pattern, its modules in PEFT): one kernel of a fused weight, several; heads; latent attention
CASES = [
    ("gpt2", "attention/(q|v)/kernel", ["c_attn"]),
    ("gpt2", "attention|ffn", ["c_attn", "attn.c_proj", "mlp.c_proj", "c_fc"]),
    ("llama", "attention/(q|v)/kernel", ["q_proj", "v_proj"]),
    ("llama", "kernel$", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]),
    ("gemma", "attention/(k|o)/kernel|ffn", ["k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    ("deepseek", "layers/attention", ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]),
    ("deepseek", "^layers/attention/o", None),
    ("t5", "attention/(q|v)/kernel", ["q", "v"]),
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    @functools.cache
    def make(name):
        model, config, settings = MODELS[name]
        made = lambda: getattr(transformers, model)(getattr(transformers, config)(**settings))  # noqa: E731
        return published.pair(made, tmp_path_factory.mktemp("published"), seed=1)

    return make


def our_logits(model, params, ids):
    if model.encode is None:
        return np.asarray(published.our_logits(model)(params, jnp.asarray(ids), jnp.ones(ids.shape, jnp.int32)))
    record = {"tokens": jnp.asarray(ids), "segments": jnp.ones(ids.shape, jnp.int32)}
    record["inputs"] = dict(record)
    return np.asarray(fast_jit(lambda p: ops.logits(model.head(p), ops.forward(model, p, record).hidden))(params))


def their_logits(reference, ids):
    with torch.no_grad():
        x = torch.tensor(ids)
        more = {"decoder_input_ids": x} if reference.config.is_encoder_decoder else {}
        return reference(x, **more).logits.numpy()


def adapted(p, match, scaling=lora.standard):
    model = lora.with_lora(p.model, rank=3, alpha=6.0, match=match, scaling=scaling)
    return model, {**p.params, "lora": weights(model.specs["lora"], seed=3)}


@pytest.mark.parametrize("name,match,modules", CASES)
def test_peft_reads_what_we_write(name, match, modules, pair, tmp_path):
    p, ids = pair(name), published.tokens((2, 8))
    model, params = adapted(p, match)
    name_there = type(p.reference).__name__
    ours.save(tmp_path / "out", p.model, params["lora"], alpha=6.0, architecture=name_there, base=str(p.directory))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(p.reference), tmp_path / "out").eval()
    want = their_logits(theirs, ids)
    assert parity.error(want, their_logits(p.reference, ids)) > 1e-2
    parity.agree("PEFT", f"{name}, written here", our_logits(model, params, ids), want, 1e-5)
    loaded = {n for n, _ in theirs.named_parameters() if "lora_" in n}
    assert len(loaded) == len(ours.safetensors.scan(tmp_path / "out"))
    # and back
    back = ours.load(tmp_path / "out", p.model, type(p.reference).__name__)
    assert back.settings["rank"] == 3 and back.settings["alpha"] == pytest.approx(6.0)
    want, have = flatten(params["lora"]), flatten(back.adapters)
    assert want.keys() == have.keys()
    real = lambda path, x: x[..., : published.VOCAB] if path == "head/kernel/b" else x  # noqa: E731
    assert all(np.allclose(real(path, want[path]), real(path, have[path]), atol=1e-6) for path in want)


@pytest.mark.parametrize("name,match,modules", [c for c in CASES if c[2]])
def test_we_read_what_peft_writes(name, match, modules, pair, tmp_path):
    p, ids = pair(name), published.tokens((2, 8))
    rslora = name == "llama"
    one = modules[-1]
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=modules, use_rslora=rslora, rank_pattern={one: 2}, alpha_pattern={one: 5}
    )
    theirs = peft.get_peft_model(copy.deepcopy(p.reference), config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for n, x in theirs.named_parameters():
            if "lora_" in n:
                x.copy_(0.3 * torch.randn_like(x))
    theirs.save_pretrained(tmp_path / "in")
    read = ours.load(tmp_path / "in", p.model, type(p.reference).__name__)
    given = {**read.settings, "scaling": lora.SCALINGS[read.settings["scaling"]]}
    model = lora.with_lora(p.model, **given)
    assert flatten(model.specs["lora"]).keys() == flatten(read.adapters).keys()
    assert all(x.shape == flatten(read.adapters)[path].shape for path, x in flatten(model.specs["lora"]).items())
    have = our_logits(model, {**p.params, "lora": read.adapters}, ids)
    parity.agree("PEFT", f"{name}, read here", have, their_logits(theirs, ids), 1e-5)


def test_rank_stabilised_and_fused(pair, tmp_path):
    """alpha / sqrt(r) in one weight of three times the rank."""
    p, ids = pair("gpt2"), published.tokens((2, 8))
    model, params = adapted(p, "attention/(q|k|v)/kernel", lora.rslora)
    ours.save(tmp_path / "out", p.model, params["lora"], alpha=6.0, scaling="rslora")
    record = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert record["use_rslora"] and record["fan_in_fan_out"] and record["rank_pattern"] == {"attn.c_attn": 9}
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(p.reference), tmp_path / "out").eval()
    parity.agree("PEFT", "gpt2, rank-stabilised", our_logits(model, params, ids), their_logits(theirs, ids), 1e-5)


def test_fresh_adapters_keep_what_they_start_from(pair, tmp_path):
    p = pair("gpt2")
    peft.get_peft_model(copy.deepcopy(p.reference), peft.LoraConfig(r=4, target_modules=["c_attn"])).save_pretrained(tmp_path)
    read = ours.load(tmp_path, p.model)
    assert read.settings == {"rank": 4, "alpha": 8.0, "match": read.settings["match"], "scaling": "standard"}
    assert all(x.any() == path.endswith("/a") for path, x in flatten(read.adapters).items())


def test_mistakes_are_said(pair, tmp_path):
    p, gemma = pair("llama"), pair("deepseek")
    _, params = adapted(p, "attention/q")
    with pytest.raises(UserError, match="no adapter_config.json"):
        ours.load(tmp_path, p.model)
    ours.save(tmp_path / "a", p.model, params["lora"], alpha=6.0)
    with pytest.raises(UserError, match="not empty"):
        ours.save(tmp_path / "a", p.model, params["lora"], alpha=6.0)
    with pytest.raises(UserError, match=r"not adapters of this model's modules: base_model.model.model.layers.0.self"):
        ours.load(tmp_path / "a", gemma.model)
    with pytest.raises(UserError, match="lora_A .* the model needs"):
        ours.load(tmp_path / "a", pair("gemma").model)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(UserError, match="use_dora=True is not supported"):
        ours.load(tmp_path / "a", p.model)
    _, params = adapted(gemma, "experts")
    with pytest.raises(UserError, match="no place for adapters on layers/ffn/experts/down/kernel"):
        ours.save(tmp_path / "b", gemma.model, params["lora"], alpha=6.0)
