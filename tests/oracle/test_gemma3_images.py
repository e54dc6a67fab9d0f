"""The text model inside a published Gemma 3 that also reads images: the same logits on text, in and out."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.convert import hf, safetensors
from jaxllm.core.types import UserError
from tests.oracle import parity, published

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXT = dict(
    vocab_size=50, hidden_size=20, intermediate_size=28, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, max_position_embeddings=64, query_pre_attn_scalar=24, sliding_window=4,
)  # fmt: skip
VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    config = transformers.Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4)
    reference = published.noise(transformers.Gemma3ForConditionalGeneration(config))
    directory = tmp_path_factory.mktemp("gemma3")
    reference.save_pretrained(directory)
    return reference, directory, *hf.load(directory)


def test_logits_on_text(both):
    reference, directory, model, params = both
    names = set(safetensors.scan(directory))
    assert any("vision_tower" in name for name in names)
    ids = published.tokens((2, published.LENGTH))
    ours = published.our_logits(model)(params, jnp.asarray(ids), jnp.ones(ids.shape, jnp.int32))
    parity.agree("Gemma3ForConditionalGeneration", "logits", ours, published.torch_logits(reference, ids), 1e-4)


def test_it_is_written_as_a_text_model(both, tmp_path):
    reference, _, model, params = both
    assert hf.save(tmp_path / "out", model, params) == "Gemma3ForCausalLM"
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = published.tokens((2, published.LENGTH))
    np.testing.assert_allclose(published.torch_logits(back, ids), published.torch_logits(reference, ids), atol=1e-4)
    with pytest.raises(UserError, match="parts for images"):
        hf.save(tmp_path / "no", model, params, architecture="Gemma3ForConditionalGeneration")
