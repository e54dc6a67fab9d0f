"""The same steps with TRL's trainers on transformers' GPT-2: training_step, then clipping and AdamW as the Trainer does."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from benchmarks import shape as given
from benchmarks.hugging_face import COMMON, finish, make_model, optimizer
from benchmarks.shape import Shape


def tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """One word an id: "w17" is 17."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(shape.vocab)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    last = f"w{shape.vocab - 1}"
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=last, pad_token=last)


def text(ids: Any) -> str:
    return " ".join(f"w{i}" for i in ids)


def dpo_step(shape: Shape) -> tuple[dict, Callable[[int], None]]:
    """DPOTrainer as it comes: the reference's forward pass in every step."""
    return _dpo(shape, precompute=False)


def dpo_step_precomputed(shape: Shape) -> tuple[dict, Callable[[int], None]]:
    """DPOTrainer with precompute_ref_log_probs."""
    return _dpo(shape, precompute=True)


def _dpo(shape: Shape, precompute: bool) -> tuple[dict, Callable[[int], None]]:
    logging.disable(logging.WARNING)
    model = make_model(shape)
    rows = []
    for step in range(given.CHECKED_STEPS):
        prompts, chosen, rejected = (x.tolist() for x in given.pairs(shape, step))
        rows += [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in zip(prompts, chosen, rejected, strict=True)]
    plain = [{side: text(row[f"{side}_ids"]) for side in ("prompt", "chosen", "rejected")} for row in rows]
    args = DPOConfig(
        output_dir=tempfile.mkdtemp(), beta=given.BETA, per_device_train_batch_size=shape.pairs, max_length=None, **COMMON,
        precompute_ref_log_probs=precompute,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=model, ref_model=None if precompute else make_model(shape), args=args,
        train_dataset=Dataset.from_list(plain[: shape.pairs]), processing_class=tokenizer(shape),
    )  # fmt: skip
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # set by the loop that this file stands in for
    batches = [trainer.data_collator(rows[i : i + shape.pairs]) for i in range(0, len(rows), shape.pairs)]
    if precompute:
        for batch in batches:
            chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
            batch |= {"ref_chosen_logps": torch.as_tensor(chosen), "ref_rejected_logps": torch.as_tensor(rejected)}
    steps = optimizer(trainer.model)
    done = 0

    def advance() -> torch.Tensor:
        nonlocal done
        loss = trainer.training_step(trainer.model, dict(batches[done % len(batches)]))
        finish(trainer, steps)
        done += 1
        return loss

    def run(times: int) -> None:
        for _ in range(times):
            advance()

    losses = [advance().item() for _ in range(given.CHECKED_STEPS)]
    trained = 2 * shape.pairs * shape.completion
    return {"parameters": model.num_parameters(), "losses": losses, "trained": trained}, run


def grpo_iteration(shape: Shape) -> tuple[dict, Callable[[int], None]]:
    """GRPOTrainer: generation by transformers, the reward in Python, one update; beta 0, so no reference."""
    logging.disable(logging.WARNING)
    model = make_model(shape)
    counted = []

    def score(completion_ids: list, **rest: Any) -> list[float]:
        counted.append(sum(map(len, completion_ids)))
        return [given.reward(row) for row in completion_ids]

    prompts = [{"prompt": text(row)} for row in given.prompts(shape)[: shape.prompts].tolist()]
    completions = shape.prompts * shape.group
    args = GRPOConfig(
        output_dir=tempfile.mkdtemp(), num_generations=shape.group, max_completion_length=shape.completion, beta=0.0,
        per_device_train_batch_size=completions, loss_type="grpo", top_k=0, **COMMON,
        generation_kwargs={"min_new_tokens": shape.completion},  # every completion has its full length, on both sides
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model, reward_funcs=score, args=args, train_dataset=Dataset.from_list(prompts), processing_class=tokenizer(shape)
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # set by the loop that this file stands in for
    steps = optimizer(trainer.model)
    rows = [row for row in prompts for _ in range(shape.group)]

    def run(times: int) -> None:
        for _ in range(times):
            trainer.training_step(trainer.model, rows, num_items_in_batch=None)
            finish(trainer, steps)

    run(1)
    return {"parameters": model.num_parameters(), "completions": completions, "trained": counted[0]}, run
