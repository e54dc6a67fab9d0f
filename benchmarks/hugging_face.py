"""transformers' GPT2LMHeadModel with the given weights, what its trainers share, and greedy decoding with its generate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks import shape as given
from benchmarks.shape import Shape

NAMES = {
    "ln_1": "norm1", "attn.c_attn": "qkv", "attn.c_proj": "out",
    "ln_2": "norm2", "mlp.c_fc": "up", "mlp.c_proj": "down",
}  # fmt: skip

COMMON = dict(
    report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, logging_strategy="no", save_strategy="no",
    disable_tqdm=True, dataloader_pin_memory=False,
)  # fmt: skip


def make_model(shape: Shape) -> GPT2LMHeadModel:
    """The given weights; transformers keeps GPT-2's kernels [in, out]."""
    config = GPT2Config(
        vocab_size=shape.vocab, n_positions=shape.length, n_embd=shape.width, n_layer=shape.layers,
        n_head=shape.heads, bos_token_id=None, eos_token_id=None, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
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


def optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW with weight decay on the matrices, fused, as in the other rows."""
    every = list(model.parameters())
    groups = [
        {"params": [x for x in every if x.ndim > 1], "weight_decay": given.WEIGHT_DECAY},
        {"params": [x for x in every if x.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=given.LEARNING_RATE, betas=(given.B1, given.B2), eps=given.EPS, fused=True)


def finish(trainer: Any, optimizer: torch.optim.Optimizer) -> None:
    """What follows the backward pass."""
    trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), given.CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


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
