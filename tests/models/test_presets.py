"""Named architectures have the published sizes; impossible ones are refused in one line."""

import json
from dataclasses import replace

import pytest

from jaxllm.core.types import UserError
from jaxllm.models import decoder, families, presets
from jaxllm.models.decoder import DecoderConfig


@pytest.mark.parametrize(
    "name,published",
    [
        ("gpt2", 124_439_808),
        ("llama3.2-1b", 1_235_814_400),
        ("llama3-8b", 8_030_261_248),
        ("llama3-70b", 70_553_706_496),
    ],
)
def test_parameter_counts_are_the_published_ones(name, published):
    assert decoder.published_count(presets.preset(name)) == published


@pytest.mark.parametrize(
    "name,published,tolerance",
    [
        ("gpt3-125m", 125e6, 0.01),
        ("gpt3-350m", 356e6, 0.01),
        ("gpt3-760m", 760e6, 0.01),
        ("gpt3-1.3b", 1.3e9, 0.02),
        ("gpt3-2.7b", 2.65e9, 0.01),
        ("gpt3-6.7b", 6.7e9, 0.01),
        ("gpt3-13b", 13e9, 0.02),
        ("gpt3-175b", 175e9, 0.01),
    ],
)
def test_gpt3_counts_are_those_of_table_2_1(name, published, tolerance):
    assert decoder.published_count(presets.preset(name)) == pytest.approx(published, rel=tolerance)


def test_every_preset_can_be_built():
    for config in presets.PRESETS.values():
        assert decoder.make(config).config == config


def test_presets_take_changes_and_refuse_unknown_names():
    assert presets.preset("tiny", n_layers=5).n_layers == 5
    with pytest.raises(UserError, match="'gpt5'.*llama3-8b"):
        presets.preset("gpt5")
    with pytest.raises(UserError, match="'layers'.*n_layers"):
        presets.preset("tiny", layers=3)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(n_heads=5), r"n_heads=5 does not divide model.d_model=16: use n_heads=2 or 4, or d_model=10 or 20"),
        (dict(n_kv_heads=3), r"n_kv_heads=3 does not divide model.n_heads=4: use one of .1, 2, 4."),
        (dict(n_kv_heads=-1), "n_kv_heads=-1 does not divide"),
        (dict(head_dim=5), "model.head_dim=5: rotary positions need an even number, such as 6"),
        (dict(positions="alibi"), "model.positions='alibi': choose one of rope, learned"),
        (dict(norm="batchnorm"), "rmsnorm, rmsnorm_offset, layernorm"),
        (dict(activation="tanh"), "gelu, gelu_exact, relu"),
        (dict(remat="some"), "none, dots, attention, full, offload"),
        (dict(dtype="int8"), "float32, bfloat16"),
        (dict(n_layers=0), "model.n_layers=0: must be at least 1"),
        (dict(vocab_size=-1), "model.vocab_size=-1"),
    ],
)
def test_impossible_configs_are_one_clear_line(change, message):
    config = DecoderConfig(vocab_size=50, d_model=16, n_heads=4, d_ff=32)
    decoder.make(config)
    with pytest.raises(UserError, match=message) as error:
        decoder.make(replace(config, **change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["llama3-8b", "llama3.1-8b", "gemma2-2b", "gemma3-4b", "mixtral-8x7b", "deepseek-v3"])
def test_a_config_survives_json(name):
    config = presets.preset(name)
    record = json.loads(json.dumps(families.to_dict(config)))
    assert record["family"] == "decoder" and families.from_dict(record) == config


def test_unknown_families_and_fields_are_refused():
    with pytest.raises(UserError, match="'rnn'.*decoder"):
        families.from_dict({"family": "rnn"})
    with pytest.raises(UserError, match="'d_modle'.*d_model"):
        families.from_dict({"family": "decoder", "vocab_size": 5, "d_modle": 4})
