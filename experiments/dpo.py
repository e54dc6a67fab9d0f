"""Direct preference optimisation and its siblings from a fine-tuned model; the reference's log-probabilities are columns.

python -m experiments.dpo --config.init=runs/sft --config.data.path=pairs.jsonl
python -m experiments.dpo --config=configs/dpo.py:simpo --config.init=runs/sft

At the first step margins are 0. On the quickstart's pairs of seeds 0, 1, 2 the gold reward rose by .46, .40, .41 at a KL of .7
to 1.1 nats an answer (docs/quickstart.md).
"""

from __future__ import annotations

import inspect
from functools import partial

import jax

from experiments import common, memory
from jaxllm import launch
from jaxllm.core.types import UserError
from jaxllm.data import pack, pairs
from jaxllm.losses import preference
from jaxllm.losses.preference import table
from jaxllm.train import gates
from jaxllm.train.annotate import with_reference_logps

LOSSES = {entry.name: entry.fn for entry in table.PAIRS + table.FREE}
# losses on the log-probabilities of tokens: the builder, and what it needs of the reference
BUILDERS = {
    "ld_dpo": (preference.ld_dpo, preference.token_logps),
    "wpo": (partial(preference.wpo, fn=preference.dpo), preference.sequence_logps),
    "token_unlikelihood": (preference.token_unlikelihood, preference.sequence_logps),
}


def options(config, fn):
    """Those settings of the config that a function takes."""
    given = {"beta": config.beta, "nll_weight": config.nll_weight, **config.hyper.to_dict()}
    return {name: given[name] for name in inspect.signature(fn).parameters if name in given}


def objective(config):
    """(model -> LossFn, (model, params, record) -> the reference's columns) of the config's loss."""
    if config.loss in BUILDERS:
        build, score = BUILDERS[config.loss]
        return partial(build, **options(config, build)), score
    if config.loss not in LOSSES:
        raise UserError(f"config.loss={config.loss!r}: choose one of {', '.join([*LOSSES, *BUILDERS])}")
    fn = LOSSES[config.loss]
    hyper = {"beta": config.beta, "nll_weight": config.nll_weight} | options(config, fn)
    return partial(preference.loss, fn=fn, **hyper), preference.sequence_logps


def main(config, run):
    build, score = objective(config)
    train, _, where, start = common.preference_rows(config, run)
    with common.open_mesh(config) as mesh:
        base = launch.load(start, default="sft", mesh=mesh)
        columns, report = pairs.encode_pairs(base.tokenizer, train, config.data.length)
        pack.check_report(report, where, base.tokenizer)
        columns = common.trimmed(columns)
        common.print_report(run, where, report)
        common.check_length(base.model, config.data.length, "config.data.length")
        common.check_batch(config, report["rows"])
        reference = jax.jit(partial(score, base.model))
        columns = with_reference_logps(reference, base.params["policy"], columns, config.batch_size)
        tx, schedule = common.optimizer(config)
        own = common.adapted(config, base.model, base.params["policy"], mesh, kept=False)
        loss_fn, params = build(own.model), {"policy": own.params}
        step = memory.Step(own.model, "policy", own.trainable, loss_fn, columns, params=params)
        state, frozen, step_fn = memory.begin(config, step, loss_fn, tx, mesh)
        final: dict[str, float] = {}
        common.fit(
            config, run, mesh=mesh, columns=columns, tokenizer=base.tokenizer, model=base.model, state=state, frozen=frozen,
            step_fn=step_fn, schedule=schedule,
            tokens_per_step=2 * config.batch_size * columns["chosen"]["tokens"].shape[1], last=final,
            turns=base.meta.get("turns", 1), checks=(gates.start(gates.PAIRS), gates.moved()),
        )  # fmt: skip
    run.finish(final, [], then=f"chat --run={run.workdir}")


if __name__ == "__main__":
    launch.run(main, "dpo")
