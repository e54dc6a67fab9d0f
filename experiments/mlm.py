"""Pretrain an encoder on masked tokens, as BERT (with next sentences) or RoBERTa (without).

python -m experiments.mlm                                         # CPU size, embedded text, about a minute
python -m experiments.mlm --config=configs/mlm.py:tiny-nsp        # and next sentences
python -m experiments.mlm --config=configs/mlm.py:bert-base --config.data.path=corpus.jsonl
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from experiments import common, pretrain
from jaxllm import launch
from jaxllm.core.types import UserError
from jaxllm.data import masking, pack
from jaxllm.losses import mlm
from jaxllm.models import encoder, pooled


class Objective(NamedTuple):
    """head: trunk -> model; rows(tokenizer, texts, length, seed) -> (columns, report); loss(model, corrupt) -> LossFn."""

    head: Callable
    rows: Callable
    loss: Callable


def whole_documents(tokenizer, texts, length, seed):
    return masking.documents(tokenizer, texts, length)


OBJECTIVES = {
    "mlm": Objective(lambda trunk: trunk, whole_documents, mlm.loss),
    "mlm+nsp": Objective(pooled.with_next_sentence_head, masking.next_sentence_rows, mlm.with_next_sentence),
}


def dynamic(columns, seed, settings):
    return columns, masking.dynamic(**settings)


def static(columns, seed, settings):
    return masking.with_static_masks(columns, seed, **settings), masking.static


MASKING = {"dynamic": dynamic, "static": static}


def check(config):
    """What cannot work is said before the text is read."""
    for name, value, table in (("objective", config.objective, OBJECTIVES), ("masking", config.masking, MASKING)):
        if value not in table:
            raise UserError(f"config.{name}={value!r}: choose one of {', '.join(table)}")
    if not 0 < config.mask_rate < 1:
        raise UserError(f"config.mask_rate={config.mask_rate}: a share above 0 and below 1 is needed, such as 0.15")
    encoder.validate(common.model_config(config, encoder.EncoderConfig, config.vocab_size))


def main(config, run):
    check(config)
    common.check_batch(config, config.batch_size)
    objective, length = OBJECTIVES[config.objective], config.data.length
    train, held_out = pretrain.corpus(config, run)
    tokenizer = masking.extended(pretrain.tokenizer_of(config, train))
    trunk = encoder.make(common.model_config(config, encoder.EncoderConfig, tokenizer.vocab_size))
    run.note(f"model: {encoder.published_count(trunk.config):,} parameters, vocabulary of {tokenizer.vocab_size:,}")
    columns, report = objective.rows(tokenizer, train, length, config.seed)
    pack.check_report(report, config.data.path or "the embedded text", tokenizer)
    common.print_report(run, "train", report)
    kept, _ = objective.rows(tokenizer, held_out or train, length, config.seed)
    unigram = masking.unigram_loss(columns, kept, tokenizer.vocab_size)
    settings = dict(mask_id=tokenizer.specials["mask"], vocab=masking.ordinary_ids(tokenizer), rate=config.mask_rate)
    columns, corrupt = MASKING[config.masking](columns, config.seed, settings)
    kept, _ = MASKING[config.masking](kept, config.seed + 1, settings)
    model = objective.head(trunk)
    with common.open_mesh(config) as mesh:
        params = common.born_sharded(model.specs, config.seed, mesh)
        final = common.fit_lm(
            config, run, mesh=mesh, model=model, params=params, tokenizer=tokenizer, rows=columns, eval_rows=kept,
            loss_fn=objective.loss(model, corrupt),
        )  # fmt: skip
    masked = final.get("eval/mlm_loss", final["eval/loss"])
    run.note(f"masked tokens cost {masked:.3f} nats, {unigram:.3f} by their frequency alone")
    run.finish(
        {**final, "eval/unigram_loss": unigram, "data/fill": report["fill"]}, [], then=f"classify --config.init={run.workdir}"
    )


if __name__ == "__main__":
    launch.run(main, "mlm")
