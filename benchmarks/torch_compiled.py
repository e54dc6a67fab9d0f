"""The same train step by torch.compile, as nanoGPT does; a cold compilation takes minutes on a small machine."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks import torch_eager
from benchmarks.shape import Shape


def train_step(shape: Shape) -> tuple[dict, Callable[[int], None]]:
    """The loss of `torch_eager` compiled, its optimizer as it is (fused)."""
    return torch_eager.train_step(shape, torch.compile(torch_eager.loss_fn))
