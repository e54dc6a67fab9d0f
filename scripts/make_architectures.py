"""Write the tables of docs/architectures.md: what families share, published sizes by our specs, parity with the reference.

    python scripts/make_architectures.py

The errors come from docs/parity.json, which the parity tests write (they need the `oracle` extra):

    JAXLLM_PARITY=docs/parity.json python -m pytest -n 0 tests/oracle
"""

import inspect
import json
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jaxllm.convert import decoders  # noqa: E402
from jaxllm.models import decoder, encdec, encoder, presets, recurrent  # noqa: E402

PAGE, PARITY = ROOT / "docs" / "architectures.md", ROOT / "docs" / "parity.json"


class Row(NamedTuple):
    """A family: its parts, the reference class that parity is measured against (its key in parity.json), and tests."""

    name: str
    parts: str
    reference: str
    tests: str


DECODERS, EXPERTS = "oracle/test_decoders", "oracle/test_experts"
ROWS = (
    Row("GPT-2, GPT-3", "learned positions, LayerNorm, GELU, biases, tied", "GPT2LMHeadModel", DECODERS),
    Row("Llama 2, 3", "RoPE (llama3, linear, yarn scaling), RMSNorm, SwiGLU, grouped queries", "LlamaForCausalLM", DECODERS),
    Row("Mistral", "Llama with a sliding window", "MistralForCausalLM", DECODERS),
    Row("Qwen2", "Llama with biases on queries, keys, values", "Qwen2ForCausalLM", DECODERS),
    Row("Qwen3", "Llama with norms on queries and keys", "Qwen3ForCausalLM", DECODERS),
    Row("Gemma", "embedding scale, RMSNorm with offset, GeGLU, tied", "GemmaForCausalLM", DECODERS),
    Row("Gemma 2", "Gemma with soft caps, sandwich norms, local and global layers in turn", "Gemma2ForCausalLM", DECODERS),
    Row("Gemma 3", "Gemma 2 without caps, with q/k norms, 5 local to 1 global, two RoPE bases", "Gemma3ForCausalLM", DECODERS),
    Row("Mixtral", "Mistral with 8 experts, top-2", "MixtralForCausalLM", EXPERTS),
    Row("Qwen3-MoE", "Qwen3 with fine-grained experts", "Qwen3MoeForCausalLM", EXPERTS),
    Row("DeepSeek-V2", "latent attention, shared and routed experts, groups, yarn", "DeepseekV2ForCausalLM", EXPERTS),
    Row("DeepSeek-V3", "V2 with sigmoid routing, correction bias, multi-token prediction", "DeepseekV3ForCausalLM", EXPERTS),
    Row("ImageGPT", "GPT-2 with RMSNorm, quick GELU, over pixels", "ImageGPTForCausalImageModeling", "oracle/test_imagegpt"),
    Row("BERT", "encoder, LayerNorm after each part, token types", "BertForPreTraining", "oracle/test_bert"),
    Row("RoBERTa", "BERT without types and next sentences, positions from 2", "RobertaForMaskedLM", "oracle/test_bert"),
    Row("T5, v1.1, FLAN-T5", "encoder-decoder, relative positions", "T5ForConditionalGeneration", "oracle/test_t5"),
    Row("LSTM, ELMo", "recurrent; two directions and a mix of layers for ELMo", "torch.nn.LSTM", "oracle/test_lstm"),
    Row("Flamingo-like", "a frozen decoder, a resampler, gated cross-attention", "", "models/test_flamingo"),
)  # fmt: skip

# Published numbers of parameters: exact where the published weights were counted, else as the paper rounds them.
PUBLISHED = {
    "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
    "gpt3-125m": "125M", "gpt3-350m": "350M", "gpt3-760m": "760M", "gpt3-1.3b": "1.3B", "gpt3-2.7b": "2.7B",
    "gpt3-6.7b": "6.7B", "gpt3-13b": "13.0B", "gpt3-175b": "175.0B",
    "llama2-7b": 6_738_415_616, "llama2-13b": 13_015_864_320, "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248, "llama3-70b": 70_553_706_496, "llama3.1-8b": 8_030_261_248,
    "llama3.1-405b": 405_853_388_800, "llama3.2-1b": 1_235_814_400, "llama3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096, "qwen2-0.5b": 494_032_768, "qwen2-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920, "qwen3-8b": 8_190_735_360,
    "gemma-2b": 2_506_172_416, "gemma-7b": 8_537_680_896, "gemma2-2b": 2_614_341_888, "gemma2-9b": 9_241_705_984,
    "gemma3-1b": 999_885_952, "gemma3-4b": "3.9B of text",
    "mixtral-8x7b": 46_702_792_704, "qwen3-30b-a3b": 30_532_122_624,
    "deepseek-v2-lite": "15.7B", "deepseek-v2": "236B", "deepseek-v3": "671B and the MTP module",
    "imagegpt-small": "76M", "imagegpt-medium": "455M", "imagegpt-large": "1.4B",
    "bert-base": "110M", "bert-large": "340M", "roberta-base": 124_697_433, "roberta-large": 355_412_057,
    "t5-small": 60_506_624, "t5-base": 222_903_552, "t5-large": 737_668_096, "t5-3b": 2_851_598_336, "t5-11b": 11_307_321_344,
    "t5-v1.1-small": 76_961_152, "t5-v1.1-base": 247_577_856, "t5-v1.1-large": 783_150_080,
    "t5-v1.1-xl": 2_849_757_184, "t5-v1.1-xxl": 11_135_332_352,
    "zaremba-medium": "20M", "zaremba-large": "66M", "elmo": "93.6M with a CNN over characters",
}  # fmt: skip


def sizes() -> list[tuple[str, int]]:
    """(preset, parameters by our specs) of every published preset."""
    modules = ((decoder, presets.PRESETS), (encoder, encoder.PRESETS), (encdec, encdec.PRESETS), (recurrent, recurrent.PRESETS))
    named = [(name, module.published_count(c)) for module, table in modules for name, c in table.items()]
    return [(name, n) for name, n in named if not name.startswith(("tiny", "flan"))]


def families_table(parity: dict) -> str:
    lines = ["| family | parts | compared with | logits | gradients | tests |", "|---|---|---|---|---|---|"]
    for row in ROWS:
        found = parity.get(row.reference, {})
        errors = [f"{found[what]:.0e}" if what in found else "" for what in ("logits", "gradients")]
        reference = f"`{row.reference}`" if row.reference else ""
        lines.append(f"| {row.name} | {row.parts} | {reference} | {errors[0]} | {errors[1]} | `tests/{row.tests}.py` |")
    return "\n".join(lines)


def sizes_table() -> str:
    lines = ["| preset | parameters by our specs | published |", "|---|---:|---:|"]
    for name, ours in sizes():
        published = PUBLISHED[name]
        lines.append(f"| `{name}` | {ours:,} | {published if isinstance(published, str) else f'{published:,}'} |")
    return "\n".join(lines)


def example() -> str:
    """How Mistral is read and written, from the source."""
    row = next(line.strip() for line in inspect.getsource(decoders).splitlines() if '"MistralForCausalLM"' in line)
    functions = "\n\n".join(inspect.getsource(f).strip() for f in (decoders.mistral, decoders.mistral_config))
    return f"```python\n{functions}\n\nFAMILIES = (..., {row} ...)\n```"


def filled(page: str) -> str:
    """The page with what stands between its markers made anew."""
    parity = json.loads(PARITY.read_text()) if PARITY.exists() else {}
    for name, table in (("families", families_table(parity)), ("sizes", sizes_table()), ("example", example())):
        start, end = f"<!-- {name}: made by scripts/make_architectures.py -->", f"<!-- end of {name} -->"
        before, rest = page.split(start)
        page = f"{before}{start}\n{table}\n{end}{rest.split(end)[1]}"
    return page


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text()))
    print(f"wrote {PAGE.relative_to(ROOT)}: {len(ROWS)} families, {len(sizes())} presets")


if __name__ == "__main__":
    main()
