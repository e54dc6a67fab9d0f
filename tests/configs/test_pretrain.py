"""Every preset is a variant of the pretraining recipe, and what its settings say is the preset."""

import pytest

from experiments.common import model_config
from jaxllm import settings
from jaxllm.models.decoder import DecoderConfig
from jaxllm.models.presets import PRESETS


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_settings_and_back(name):
    config = settings.load_config(settings.CONFIGS / "pretrain.py", name)
    assert model_config(config, DecoderConfig, PRESETS[name].vocab_size) == PRESETS[name]


def test_nested_settings_are_checked_and_typed():
    config = settings.load_config(settings.CONFIGS / "pretrain.py", "mixtral-8x7b")
    values, errors = settings.check_overrides(config, {"model.moe.top_k": "3", "model.moe.capacity_factor": "1.25"})
    assert not errors and values == {"model.moe.top_k": 3, "model.moe.capacity_factor": 1.25}
    _, errors = settings.check_overrides(config, {"model.moe.topk": "3"})
    assert "top_k" in errors[0]
