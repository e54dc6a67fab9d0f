"""Reading and writing published directories, without torch: our own exports, with everything that can be wrong with them."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxllm.convert import hf, layout, safetensors
from jaxllm.core import ops, sharding, spec
from jaxllm.core.tree import flatten
from jaxllm.core.types import UserError
from jaxllm.models import decoder, families
from tests.convert.shapes import CONFIGS, LLAMA
from tests.models.tiny import fast_jit, weights

ROOT = Path(__file__).resolve().parents[2]


def made(config, seed=0):
    model = decoder.make(config)
    return model, weights(model.specs, seed)


def trimmed(model, params):
    """Parameters without the rows that pad the vocabulary: what an export keeps."""
    specs, rows = flatten(model.specs), model.config.vocab_size
    cut = {p: x[tuple(slice(rows if a == "vocab" else None) for a in specs[p].axes)] for p, x in flatten(params).items()}
    return {path: np.asarray(x) for path, x in cut.items()}


def same(a, b):
    assert a.keys() == b.keys()
    return all(a[p].dtype == b[p].dtype and a[p].tobytes() == b[p].tobytes() for p in a)


@pytest.fixture
def llama(tmp_path):
    """A directory that can be damaged, and what it holds."""
    model, params = made(LLAMA)
    hf.save(tmp_path / "llama", model, params)
    return tmp_path / "llama", model, params


def change(directory, **values):
    """Keys of config.json replaced; None removes."""
    file = directory / "config.json"
    config = {k: v for k, v in {**json.loads(file.read_text()), **values}.items() if v is not None}
    file.write_text(json.dumps(config))


def rewrite(directory, fn):
    """The tensors of model.safetensors replaced by fn(tensors)."""
    arrays = fn({name: safetensors.view(t).copy() for name, t in safetensors.scan(directory).items()})
    safetensors.write(directory / "model.safetensors", [(n, a.dtype, a.shape) for n, a in arrays.items()], arrays.values())


# ---- every family both ways


@pytest.mark.parametrize("architecture", CONFIGS)
def test_round_trip_is_bit_exact(architecture, tmp_path):
    model, params = made(CONFIGS[architecture])
    assert hf.save(tmp_path / "a", model, params) == architecture
    assert json.loads((tmp_path / "a" / "config.json").read_text())["architectures"] == [architecture]
    again, read = hf.load(tmp_path / "a")
    assert same(trimmed(model, params), trimmed(again, read))
    assert jax.tree.structure(read) == jax.tree.structure(params)
    assert not any(np.asarray(x)[50:].any() for x in [read["embed"]["tokens"]])  # the padding is zeros, not what memory held
    hf.save(tmp_path / "b", again, read)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert hf.load(tmp_path / "b")[0].config == again.config


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Gemma3ForCausalLM", "DeepseekV3ForCausalLM"])
def test_loaded_weights_compute_the_same(architecture, tmp_path):
    model, params = made(CONFIGS[architecture])
    hf.save(tmp_path / "a", model, params)
    again, read = hf.load(tmp_path / "a")
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 9)))
    logits = [np.asarray(fast_jit(lambda p, m=m: ops.logits(m.head(p), m.apply(p, tokens).hidden))(p))
              for m, p in ((model, params), (again, read))]  # fmt: skip
    assert logits[1].shape == (2, 9, 50)
    assert np.array_equal(*logits)


def test_names_on_disk_are_the_published_ones(llama):
    names = safetensors.scan(llama[0])
    assert names["model.embed_tokens.weight"].shape == (50, 16) and names["lm_head.weight"].shape == (50, 16)
    assert names["model.layers.1.self_attn.q_proj.weight"].shape == (24, 16)
    assert names["model.layers.0.self_attn.o_proj.weight"].shape == (16, 24)
    assert len(names) == 3 + 2 * 9
    assert sorted(p.name for p in llama[0].iterdir()) == ["config.json", "model.safetensors"]


def test_tied_weights_are_stored_once(tmp_path):
    model, params = made(dataclasses.replace(LLAMA, tied=True))
    hf.save(tmp_path / "a", model, params)
    assert "lm_head.weight" not in safetensors.scan(tmp_path / "a")


def test_a_pattern_written_otherwise_is_the_same_architecture(tmp_path):
    config = dataclasses.replace(CONFIGS["Gemma2ForCausalLM"], windows=(4, 0, 4, 0), n_kv_heads=2)
    assert hf.save(tmp_path / "a", *made(config)) == "Gemma2ForCausalLM"
    assert hf.load(tmp_path / "a")[0].config.windows == (4, 0)


def test_training_settings_do_not_matter_to_an_export(tmp_path):
    config = dataclasses.replace(LLAMA, dtype="bfloat16", remat="full", unroll=True)
    assert hf.save(tmp_path / "a", *made(config)) == "LlamaForCausalLM"


# ---- where and as what


def test_parameters_are_born_on_the_mesh(tmp_path):
    config = dataclasses.replace(CONFIGS["Qwen3MoeForCausalLM"], n_kv_heads=2)
    model, params = made(config)
    hf.save(tmp_path / "a", model, params)
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2, "expert": 2})
    again, read = hf.load(tmp_path / "a", mesh=mesh)
    want = spec.shardings(again.specs, mesh, sharding.RULES)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), read, want)))
    assert same(trimmed(model, params), trimmed(again, read))
    experts = read["layers"]["ffn"]["experts"]["up"]["kernel"]
    assert experts.addressable_shards[0].data.size * 8 == experts.size
    hf.save(tmp_path / "b", again, read)  # and from the mesh back
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_host_memory_holds_one_tensor(tmp_path):
    config = dataclasses.replace(LLAMA, vocab_size=4096, d_model=256, n_heads=4, head_dim=64, d_ff=4096, n_layers=3)
    model, params = made(config)
    hf.save(tmp_path / "a", model, params)
    found = safetensors.scan(tmp_path / "a")
    sizes = [int(np.prod(t.shape)) * t.dtype.itemsize for t in found.values()]
    assert sum(sizes) > 8 * max(sizes) == 8 * 4 * 4096 * 256
    hf.load(tmp_path / "a")  # compiles
    tracemalloc.start()
    try:
        hf.load(tmp_path / "a")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.1 * max(sizes), f"{peak} bytes on the host, the largest tensor has {max(sizes)}"


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_dtypes(stored, tmp_path):
    model, params = made(LLAMA)
    hf.save(tmp_path / "a", model, params, dtype=stored)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == stored
    again, read = hf.load(tmp_path / "a")
    assert again.config.dtype == stored and {str(x.dtype) for x in jax.tree.leaves(read)} == {"float32"}
    kind = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}[stored]
    ours = {p: x.astype(kind).astype(np.float32) for p, x in trimmed(model, params).items()}
    assert same(ours, trimmed(again, read))
    half, read = hf.load(tmp_path / "a", dtype="bfloat16")
    assert half.config.dtype == "bfloat16" and {str(x.dtype) for x in jax.tree.leaves(read)} == {"bfloat16"}
    with pytest.raises(UserError, match="dtype='int8'"):
        hf.load(tmp_path / "a", dtype="int8")


def test_the_correction_bias_stays_float32(tmp_path):
    hf.save(tmp_path / "a", *made(CONFIGS["DeepseekV3ForCausalLM"]), dtype="bfloat16")
    kinds = {n: str(t.dtype) for n, t in safetensors.scan(tmp_path / "a").items()}
    assert {k for n, k in kinds.items() if n.endswith("e_score_correction_bias")} == {"float32"}
    assert {k for n, k in kinds.items() if not n.endswith("e_score_correction_bias")} == {"bfloat16"}


# ---- config.json in older and newer spellings


@pytest.mark.parametrize(
    "written",
    [
        {"rope_parameters": None, "rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_parameters": {"rope_theta": 7.0, "rope_type": "linear", "factor": 2.0}, "rope_theta": None, "rope_scaling": None},
    ],
)
def test_rope_in_both_spellings(written, llama):
    change(llama[0], **written)
    config = hf.load(llama[0])[0].config
    assert config.rope_theta == 7.0 and config.rope_scaling.kind == "linear" and config.rope_scaling.factor == 2.0


def test_without_architectures_the_model_type_decides(llama):
    change(llama[0], architectures=None, torch_dtype="bfloat16", dtype=None)
    assert hf.load(llama[0])[0].config.dtype == "bfloat16"
    change(llama[0], model_type="rwkv")
    with pytest.raises(UserError, match="model_type 'rwkv' is not supported: GPT2LMHeadModel, Llama"):
        hf.load(llama[0])


def test_gpt2_in_the_spelling_of_its_first_files(tmp_path):
    model, params = made(CONFIGS["GPT2LMHeadModel"])
    hf.save(tmp_path / "a", model, params)
    rewrite(tmp_path / "a", lambda tensors: {
        **{n.removeprefix("transformer."): a for n, a in tensors.items()}, "h.0.attn.bias": np.ones((1, 1, 32, 32), np.uint8),
    })  # fmt: skip
    assert same(trimmed(model, params), trimmed(*hf.load(tmp_path / "a")))


def test_modules_that_config_json_promises_may_be_absent(tmp_path):
    config = dataclasses.replace(CONFIGS["DeepseekV3ForCausalLM"], mtp_layers=0)
    hf.save(tmp_path / "a", *made(config))
    change(tmp_path / "a", num_nextn_predict_layers=1)
    assert hf.load(tmp_path / "a")[0].config.mtp_layers == 0


UNSUPPORTED = {
    "rope_type='longrope'": {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1.0, "factor": 2.0}},
    "partial_rotary_factor=0.5": {"partial_rotary_factor": 0.5},
    "low_freq_factor is missing": {"rope_parameters": {"rope_type": "llama3", "factor": 2.0, "high_freq_factor": 4.0}},
    "without a factor": {"rope_parameters": {"rope_type": "linear"}},
    "hidden_act='swish2' is not supported: it may be silu": {"hidden_act": "swish2"},
    "hidden_size is '16', a int is needed": {"hidden_size": "16"},
    "vocab_size is missing": {"vocab_size": None},
    "quantised .fp8.": {"quantization_config": {"quant_method": "fp8"}},
    "pretraining_tp=2": {"pretraining_tp": 2},
    "MambaForCausalLM is not supported: GPT2LMHeadModel": {"architectures": ["MambaForCausalLM"]},
}


@pytest.mark.parametrize("words", UNSUPPORTED)
def test_what_is_not_supported_is_named(words, llama):
    change(llama[0], **UNSUPPORTED[words])
    with pytest.raises(UserError, match=words) as error:
        hf.load(llama[0])
    assert "config.json" in str(error.value) or "quantised" in words


# ---- wrong tensors


def test_missing_unknown_and_misshapen_tensors_are_listed(llama):
    directory = llama[0]

    def damage(tensors):
        gone = {n: a for n, a in tensors.items() if "layers.0." not in n}
        gone["model.norm.weight"] = np.ones(17, np.float32)
        return gone | {f"extra.{i}": np.ones(1, np.float32) for i in range(7)}

    rewrite(directory, damage)
    with pytest.raises(UserError) as error:
        hf.load(directory)
    text = str(error.value)
    assert "9 missing: model.layers.0." in text and "7 unknown: extra.0 (1,)" in text
    assert text.count("extra.") == 5 and text.count("layers.0.") == 5
    assert "model.norm.weight: here (16,), in the file (17,)" in text and "\n" not in text


@pytest.mark.parametrize("key,value", [("num_hidden_layers", 10**7), ("hidden_size", 10**6 * 4), ("vocab_size", 10**7)])
def test_a_config_that_no_memory_holds_is_refused_before_anything_is_made(key, value, llama):
    change(llama[0], **{key: value})
    with pytest.raises(UserError, match="describes [0-9,]+ parameters, the files hold 6,288"):
        hf.load(llama[0])
    change(llama[0], **{key: 10**12})
    with pytest.raises(UserError, match=f"{key}=1000000000000 is out of range"):
        hf.load(llama[0])


def test_integers_are_no_weights(llama):
    rewrite(llama[0], lambda tensors: {n: a.astype(np.int32) if n == "model.norm.weight" else a for n, a in tensors.items()})
    with pytest.raises(UserError, match="int32"):
        hf.load(llama[0])


def test_not_a_model_directory(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        hf.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="no config.json"):
        hf.load(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]')
    with pytest.raises(UserError, match="not JSON"):
        hf.load(tmp_path)


def test_a_pickle_instead_of_safetensors(llama):
    (llama[0] / "model.safetensors").rename(llama[0] / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin may run code"):
        hf.load(llama[0])


# ---- writing


def test_shards_and_their_index(tmp_path):
    model, params = made(LLAMA)
    hf.save(tmp_path / "a", model, params, shard_bytes=6000)
    files = sorted(p.name for p in (tmp_path / "a").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 2
    assert all((tmp_path / "a" / f).stat().st_size < 6000 + 4000 for f in files)
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in trimmed(model, params).values())
    assert same(trimmed(model, params), trimmed(*hf.load(tmp_path / "a")))


def test_a_directory_with_content_is_left_alone(llama, tmp_path):
    before = (llama[0] / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="not empty"):
        hf.save(llama[0], llama[1], llama[2])
    assert (llama[0] / "model.safetensors").read_bytes() == before
    (tmp_path / "empty").mkdir()
    hf.save(tmp_path / "empty", llama[1], llama[2])
    assert (tmp_path / "empty" / "config.json").exists()


def test_a_failing_export_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors, "write", fail)
    with pytest.raises(OSError, match="No space"):
        hf.save(tmp_path / "a", *made(LLAMA))
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from jaxllm.convert import hf, safetensors
from tests.convert.test_hf import LLAMA, made
whole, left = safetensors.write, [int(sys.argv[2])]
def write(*arguments):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    whole(*arguments)
safetensors.write = write
hf.save(sys.argv[1], *made(LLAMA), shard_bytes=6000)
"""


@pytest.mark.parametrize("shards", [0, 2])
def test_a_killed_export_is_never_visible(shards, tmp_path):
    target = tmp_path / "a"
    command = [sys.executable, "-c", KILLED, str(target), str(shards)]
    killed = subprocess.run(command, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not target.exists()
    assert len(list(tmp_path.glob(".a.part-*"))) == 1
    hf.save(target, *made(LLAMA))  # the same command again: it works, and clears what was left
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_no_published_architecture_holds(tmp_path):
    config = dataclasses.replace(LLAMA, norm="layernorm")
    with pytest.raises(UserError, match="no published architecture holds.*norm='layernorm' would become 'rmsnorm'"):
        hf.save(tmp_path / "a", *made(config))
    with pytest.raises(UserError, match="'Llama' is not supported: GPT2LMHeadModel"):
        hf.save(tmp_path / "a", *made(LLAMA), architecture="Llama")
    assert hf.save(tmp_path / "a", *made(LLAMA), architecture="MistralForCausalLM") == "MistralForCausalLM"


def test_parameters_of_another_model_are_refused(tmp_path):
    model, params = made(LLAMA)
    with pytest.raises(UserError, match="merge adapters first.*lora"):
        hf.save(tmp_path / "a", model, {**params, "lora": {"a": jnp.ones(2)}})
    with pytest.raises(UserError, match="not the model's: embed/tokens"):
        hf.save(tmp_path / "a", model, {**params, "embed": {"tokens": jnp.ones((3, 3))}})
    assert list(tmp_path.iterdir()) == []


# ---- the table of families, and the hub


def test_every_table_makes_every_leaf_once():
    for architecture, config in CONFIGS.items():
        paths = [p for leaf in layout.families()[architecture].leaves(config) for p in leaf.paths]
        assert sorted(paths) == sorted(flatten(families.make(config).specs)), architecture


def test_a_name_on_the_hub_without_a_network(monkeypatch, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def unreachable(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="org/name: offline.*pass a local path"):
        hf.from_pretrained("org/name")
    with pytest.raises(UserError, match="not a name on the hub"):
        hf.from_pretrained("../somewhere/else")
