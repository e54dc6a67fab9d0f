"""Greedy decoding with transformers' GPT2LMHeadModel.generate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks import shape as given
from benchmarks.shape import Shape

NAMES = {
    "ln_1": "norm1", "attn.c_attn": "qkv", "attn.c_proj": "out",
    "ln_2": "norm2", "mlp.c_fc": "up", "mlp.c_proj": "down",
}  # fmt: skip


def make_model(shape: Shape) -> GPT2LMHeadModel:
    """The given weights; transformers keeps GPT-2's kernels [in, out]."""
    config = GPT2Config(
        vocab_size=shape.vocab, n_positions=shape.length, n_embd=shape.width, n_layer=shape.layers,
        n_head=shape.heads, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    w = {name: torch.tensor(x) for name, x in given.weights(shape).items()}
    state = {
        "wte.weight": w["wte"], "wpe.weight": w["wpe"],
        "ln_f.weight": w["norm_scale"], "ln_f.bias": w["norm_bias"],
    }  # fmt: skip
    for i in range(shape.layers):
        for theirs, ours in NAMES.items():
            part = "scale" if ours.startswith("norm") else "kernel"
            state[f"h.{i}.{theirs}.weight"] = w[f"{ours}_{part}"][i]
            state[f"h.{i}.{theirs}.bias"] = w[f"{ours}_bias"][i]
    model.transformer.load_state_dict(state)
    return model


def generate(shape: Shape) -> tuple[dict, Callable[[int], None]]:
    """Greedy decoding with its default cache and without a stop token."""
    model = make_model(shape)
    prompts = torch.from_numpy(given.prompts(shape)).long()
    mask = torch.ones_like(prompts)

    def once() -> torch.Tensor:
        with torch.inference_mode():
            return model.generate(prompts, attention_mask=mask, do_sample=False, max_new_tokens=shape.new_tokens, pad_token_id=0)

    def run(times: int) -> None:
        for _ in range(times):
            once()

    return {"parameters": model.num_parameters(), "tokens": once().tolist()}, run
