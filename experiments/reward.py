"""Train a reward model on pairs, on pairs with a margin, or on rankings, from a fine-tuned model's weights.

python -m experiments.reward --config.init=runs/sft --config.data.path=pairs.jsonl

Rows are preference pairs ({"prompt", "chosen", "rejected"}), with `margin` (how much better chosen is) where every row has one,
or rankings {"prompt", "ranked": [best, ..., worst]}, whose completions all stand in one batch element.

The loss begins at ln 2. On the quickstart's pairs of seeds 0, 1, 2 it chose as the annotator did in .82, .77, .76 of the
held-out ones, length alone in .70, .66, .66 (docs/quickstart.md).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments import common, memory, reading, speed
from jaxllm import launch
from jaxllm.core.types import UserError
from jaxllm.data import pack, pairs
from jaxllm.data.ranked import as_pairs, encode_ranked, is_ranked, normalise_ranked
from jaxllm.data.text import first_row
from jaxllm.evals import reward_checks
from jaxllm.losses import reward
from jaxllm.models import heads
from jaxllm.report import figures
from jaxllm.train.loop import evaluate_means
from jaxllm.train.step import trained_roots

RANKINGS = {"kwise": reward.kwise, "plackett_luce": reward.plackett_luce}


def rows_of(config, run):
    """(train rows, held-out rows, where they come from, the SFT run to start from) of pairs or rankings."""
    path, eval_path = config.data.path, config.data.eval_path
    if not path or not is_ranked(first_row(path)):
        return common.preference_rows(config, run)
    rows, kept = (reading.checked(config, run, p, normalise_ranked) if p else [] for p in (path, eval_path))
    common.check_batch(config, len(rows))
    start = common.need("sft", config.init, config, run)
    return *((rows, kept) if kept else common.hold_out(rows, 0.1, config.seed)), path, start


def columns_of(tokenizer, rows, length):
    """(columns, report): {chosen, rejected} of pairs and `margin` where the rows have it, {ranked, valid} of rankings."""
    if "ranked" not in rows[0]:
        return pairs.encode_pairs(tokenizer, rows, length)
    columns, report = encode_ranked(tokenizer, rows, length)
    return (as_pairs(columns) if "margin" in columns else columns), report


def trimmed(columns):
    """Columns without the padding at the end that no row uses."""
    if "ranked" not in columns:
        return common.trimmed(columns)
    used = int(columns["ranked"]["segments"].any(axis=(0, 1)).sum())
    return {**columns, "ranked": {name: x[..., : -(-used // 8) * 8] for name, x in columns["ranked"].items()}}


def loss_of(config, scalars, columns):
    """The loss that reads these columns."""
    if config.ranking not in RANKINGS:
        raise UserError(f"config.ranking={config.ranking} is none of {', '.join(RANKINGS)}")
    if "ranked" in columns:
        return reward.ranked_loss(scalars, RANKINGS[config.ranking], center=config.center)
    return reward.loss(scalars, center=config.center)


def judged(scalars, params, batch):
    """(scores, lengths in trained tokens, which are there), each [b, k]: of pairs k is 2, the chosen side first."""
    ranked = batch.get("ranked")
    if ranked is None:
        ranked = jax.tree.map(lambda c, r: jnp.stack([c, r], axis=1), batch["chosen"], batch["rejected"])
    rows = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), ranked)
    lengths = ranked["mask"].sum(axis=-1)
    return reward.score(scalars, params, rows).reshape(lengths.shape), lengths, batch.get("valid", lengths >= 0)


def check(run, scalars, params, columns, size, mesh):
    """What the scores are worth on held-out data: calibration, drawn too, and what length alone would have got."""
    # the same on every process, so that each of several can read it
    look = jax.jit(partial(judged, scalars), out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    found = [jax.device_get(look(params, batch)) for batch in common.eval_batches(columns, size, mesh)]
    if not found:
        return {}
    scores, lengths, valid = (np.concatenate(x) for x in zip(*found, strict=True))
    i, j = np.triu_indices(scores.shape[1], 1)
    use = valid[:, i] & valid[:, j]
    margin = (scores[:, i] - scores[:, j])[use]
    predicted, observed, counts = reward_checks.calibration(margin)
    run.figure("calibration", figures.calibration_plot(predicted, observed, counts, title="Reward model on held-out pairs"))
    right = reward_checks.accuracy(margin, np.zeros_like(margin))
    return {
        "eval/accuracy_low": right.low, "eval/accuracy_high": right.high,
        "eval/calibration_error": reward_checks.calibration_error(margin),
        "eval/length_only_accuracy": reward_checks.length_only(lengths[:, i][use], lengths[:, j][use]).mean,
    }  # fmt: skip


def main(config, run):
    train, held_out, where, start = rows_of(config, run)
    with common.open_mesh(config) as mesh:
        base = launch.load(start, default="sft", mesh=mesh)
        model = heads.with_scalar_head(base.model)
        columns, report = columns_of(base.tokenizer, train, config.data.length)
        eval_columns, _ = columns_of(base.tokenizer, held_out, config.data.length)
        pack.check_report(report, where, base.tokenizer)
        columns = trimmed(columns)
        common.print_report(run, where, report)
        common.check_length(base.model, config.data.length, "config.data.length")
        common.check_batch(config, report["rows"])
        fresh = common.born_sharded(model.specs, config.seed, mesh)
        begun = heads.graft(fresh, base.params["policy"])
        own = common.adapted(config, model, begun, mesh, root="reward", kept=False)
        scalars = partial(heads.scalars, own.model)
        tx, schedule = common.optimizer(config)
        loss_fn, params = loss_of(config, scalars, columns), {"reward": own.params}
        step = memory.Step(own.model, "reward", own.trainable, loss_fn, columns, params=params)
        state, frozen, step_fn = memory.begin(config, step, loss_fn, tx, mesh)
        evaluator = jax.jit(lambda params, batch: loss_fn(params, batch, None)[1])
        size = min(config.batch_size, len(held_out) // 2 * 2)
        final: dict[str, float] = {}

        def evaluate(step, params):
            values = evaluate_means(evaluator, params, common.eval_batches(eval_columns, size, mesh))
            final.update({f"eval/{k}": v for k, v in values.items()})
            run.log(step, final)

        completions = columns["valid"].shape[1] if "valid" in columns else 2
        state = common.fit(
            config, run, mesh=mesh, columns=columns, tokenizer=base.tokenizer, model=base.model, state=state, frozen=frozen,
            step_fn=step_fn, schedule=schedule, evaluate=evaluate,
            tokens_per_step=completions * config.batch_size * config.data.length,
        )  # fmt: skip
        final = final or speed.logged(run, config.steps, "eval/")
        final |= check(run, scalars, trained_roots(state.params, frozen)["reward"], eval_columns, size, mesh)
    run.finish(final, [])


if __name__ == "__main__":
    launch.run(main, "reward")
