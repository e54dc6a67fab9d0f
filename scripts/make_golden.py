"""Write tests/golden/*.json: a few logits of transformers' own models under weights made from a seed (needs torch).

python scripts/make_golden.py [name ...]

tests/convert/test_golden.py makes the same weights by the same names, writes them as a published directory, loads that with
jaxllm.convert.hf and compares: parity that is tested where torch is not installed. Run it again when a family is added or
transformers changes a published name; the difference then shows in git.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import transformers  # noqa: E402

from jaxllm.convert import safetensors  # noqa: E402
from tests.convert import golden  # noqa: E402
from tests.oracle import test_decoders, test_experts  # noqa: E402

ENCODER = dict(
    vocab_size=50, hidden_size=20, num_hidden_layers=2, num_attention_heads=4, intermediate_size=28, max_position_embeddings=24,
    pad_token_id=0,
)  # fmt: skip
T5 = dict(
    vocab_size=50, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_heads=3, decoder_start_token_id=0,
    relative_attention_num_buckets=8, relative_attention_max_distance=10,
)  # fmt: skip
MORE = {
    "bert": ("BertForMaskedLM", "BertConfig", ENCODER),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", {**ENCODER, "type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5, gated": ("T5ForConditionalGeneration", "T5Config", {**T5, "feed_forward_proj": "gated-gelu"}),
    "imagegpt": (
        "ImageGPTForCausalImageModeling", "ImageGPTConfig",
        dict(vocab_size=51, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=50, eos_token_id=None),
    ),
}  # fmt: skip
KEPT_OUT = ("transformers_version", "_name_or_path")


def make(name, model, config, settings):
    """The record of one case: config.json, what identifies the tensors, and the kept logits."""
    kind = getattr(transformers, model)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        kind(getattr(transformers, config)(**settings)).save_pretrained(directory)
        shapes = {n: t.shape for n, t in safetensors.scan(directory).items()}
        golden.write(directory, shapes)
        reference = kind.from_pretrained(directory, attn_implementation="eager").eval()
        published = json.loads((directory / "config.json").read_text())
        with torch.no_grad():
            tokens = torch.tensor(golden.TOKENS)
            more = {"decoder_input_ids": tokens} if reference.config.is_encoder_decoder else {}
            logits = reference(tokens, **more).logits.numpy()
    published = {k: v for k, v in published.items() if k not in KEPT_OUT}
    made_by = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return {"name": name, "made_by": made_by, "config": published, "tensors": golden.digest(shapes), **golden.pick(logits)}


def main(names):
    folder = Path(__file__).resolve().parents[1] / "tests" / "golden"
    folder.mkdir(exist_ok=True)
    for name, case in {**test_decoders.CASES, **test_experts.CASES, **MORE}.items():
        if not names or name in names:
            file = folder / f"{re.sub('[^a-z0-9]+', '_', name)}.json"
            file.write_text(json.dumps(make(name, *case)) + "\n")
            print(f"{file.name}: {file.stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
