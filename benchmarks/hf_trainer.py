"""The same train step with transformers' Trainer: its training_step, then clipping and AdamW as its own loop has them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import torch
from transformers import Trainer, TrainingArguments

from benchmarks import shape as given
from benchmarks.hugging_face import COMMON, finish, make_model, optimizer
from benchmarks.shape import Shape


def train_step(shape: Shape) -> tuple[dict, Callable[[int], None]]:
    """Scaled-dot-product attention, no dropout; the targets are given, so that none is lost to shifting inside the model."""
    model = make_model(shape)
    args = TrainingArguments(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=shape.batch, **COMMON)
    trainer = Trainer(model=model, args=args)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # set by the loop that this file stands in for
    steps = optimizer(trainer.model)
    done = 0

    def advance() -> torch.Tensor:
        nonlocal done
        tokens, targets = (torch.from_numpy(x).long() for x in given.batch(shape, done))
        loss = trainer.training_step(trainer.model, {"input_ids": tokens, "labels": tokens, "shift_labels": targets})
        finish(trainer, steps)
        done += 1
        return loss

    def run(times: int) -> None:
        for _ in range(times):
            advance()

    losses = [advance().item() for _ in range(given.CHECKED_STEPS)]
    return {"parameters": model.num_parameters(), "losses": losses}, run
