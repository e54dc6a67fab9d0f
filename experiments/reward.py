"""Train a reward model on pairs, from a fine-tuned model's weights.

python -m experiments.reward --config.init=runs/sft --config.data.path=pairs.jsonl
"""

from __future__ import annotations

from functools import partial

import jax

from experiments import common
from jaxllm import launch
from jaxllm.data import pack, pairs
from jaxllm.losses import reward
from jaxllm.models import heads
from jaxllm.train.loop import evaluate_means


def main(config, run):
    train, held_out, where, start = common.preference_rows(config, run)
    with common.open_mesh(config) as mesh:
        base = launch.load(start, default="sft", mesh=mesh)
        model = heads.with_scalar_head(base.model)
        columns, report = pairs.encode_pairs(base.tokenizer, train, config.data.length)
        eval_columns, _ = pairs.encode_pairs(base.tokenizer, held_out, config.data.length)
        pack.check_report(report, where)
        columns = common.trimmed(columns)
        common.print_report(run, where, report)
        common.check_length(base.model, config.data.length, "config.data.length")
        common.check_batch(config, report["rows"])
        fresh = common.born_sharded(model.specs, config.seed, mesh)
        tx, schedule = common.optimizer(config)
        state, frozen = common.new_state({"reward": heads.graft(fresh, base.params["policy"])}, tx, mesh)
        loss_fn = reward.loss(partial(heads.scalars, model), center=config.center)
        evaluator = jax.jit(lambda params, batch: loss_fn(params, batch, None)[1])
        size = min(config.batch_size, len(held_out) // 2 * 2)
        final: dict[str, float] = {}

        def evaluate(step, params):
            values = evaluate_means(evaluator, params, common.eval_batches(eval_columns, size, mesh))
            final.update({f"eval/{k}": v for k, v in values.items()})
            run.log(step, final)

        common.fit(
            config, run, mesh=mesh, columns=columns, tokenizer=base.tokenizer, model=base.model, state=state, frozen=frozen,
            step_fn=common.jit_step(loss_fn, tx, state, config.accumulate), schedule=schedule, evaluate=evaluate,
            tokens_per_step=2 * config.batch_size * config.data.length,
        )  # fmt: skip
    run.finish(final, [])


if __name__ == "__main__":
    launch.run(main, "reward")
