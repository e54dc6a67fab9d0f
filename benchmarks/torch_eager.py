"""The same train step in eager PyTorch, in the manner of nanoGPT: fused attention and fused AdamW."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks import shape as given
from benchmarks.shape import Shape

LAYER = ("norm1", "qkv", "out", "norm2", "up", "down")


def make_params(shape: Shape) -> dict:
    """The given weights as leaves with gradients; kernels [out, in], as torch.nn.Linear holds them."""
    w = given.weights(shape)

    def leaf(name: str, x) -> torch.Tensor:
        x = torch.tensor(x.T if name.endswith("_kernel") else x)
        return x.contiguous().requires_grad_()

    blocks = [{k: leaf(k, x[i]) for k, x in w.items() if k.startswith(LAYER)} for i in range(shape.layers)]
    return {"blocks": blocks, **{k: leaf(k, w[k]) for k in ("wte", "wpe", "norm_scale", "norm_bias")}}


def leaves(params: dict) -> list[torch.Tensor]:
    blocks = [x for block in params["blocks"] for x in block.values()]
    return blocks + [x for name, x in params.items() if name != "blocks"]


def attention(p: dict, x: torch.Tensor, heads: int) -> torch.Tensor:
    b, t, d = x.shape
    q, k, v = F.linear(x, p["qkv_kernel"], p["qkv_bias"]).split(d, dim=2)
    q, k, v = (a.view(b, t, heads, d // heads).transpose(1, 2) for a in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.linear(y.transpose(1, 2).reshape(b, t, d), p["out_kernel"], p["out_bias"])


def loss_fn(params: dict, tokens: torch.Tensor, targets: torch.Tensor, heads: int) -> torch.Tensor:
    width = params["wte"].shape[1]
    x = F.embedding(tokens, params["wte"]) + params["wpe"][: tokens.shape[1]]
    for p in params["blocks"]:
        x = x + attention(p, F.layer_norm(x, (width,), p["norm1_scale"], p["norm1_bias"]), heads)
        h = F.layer_norm(x, (width,), p["norm2_scale"], p["norm2_bias"])
        h = F.gelu(F.linear(h, p["up_kernel"], p["up_bias"]), approximate="tanh")
        x = x + F.linear(h, p["down_kernel"], p["down_bias"])
    x = F.layer_norm(x, (width,), params["norm_scale"], params["norm_bias"])
    return F.cross_entropy(F.linear(x, params["wte"]).flatten(0, 1), targets.flatten())


def train_step(shape: Shape, objective: Callable = loss_fn) -> tuple[dict, Callable[[int], None]]:
    """AdamW with clipping and weight decay on the matrices."""
    params = make_params(shape)
    every = leaves(params)
    groups = [
        {"params": [x for x in every if x.ndim > 1], "weight_decay": given.WEIGHT_DECAY},
        {"params": [x for x in every if x.ndim == 1], "weight_decay": 0.0},
    ]
    betas = (given.B1, given.B2)
    optimizer = torch.optim.AdamW(groups, lr=given.LEARNING_RATE, betas=betas, eps=given.EPS, fused=True)
    done = 0

    def advance() -> torch.Tensor:
        nonlocal done
        tokens, targets = (torch.from_numpy(x).long() for x in given.batch(shape, done))
        loss = objective(params, tokens, targets, shape.heads)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(every, given.CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done += 1
        return loss

    def run(steps: int) -> None:
        for _ in range(steps):
            advance()

    losses = [advance().item() for _ in range(given.CHECKED_STEPS)]
    return {"parameters": sum(x.numel() for x in every), "losses": losses}, run
