"""Direct preference optimisation from a fine-tuned model; the reference's log-probabilities are columns of the data.

python -m experiments.dpo --config.init=runs/sft --config.data.path=pairs.jsonl
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from experiments import common
from jaxllm import launch
from jaxllm.core.types import UserError
from jaxllm.data import pack, pairs
from jaxllm.losses import preference
from jaxllm.train.annotate import with_reference_logps

LOSSES = {"dpo": preference.dpo, "cdpo": preference.cdpo, "reference_free": preference.reference_free}


def loss_of(config):
    """The array-level loss of the config, with what it takes beyond beta."""
    if config.loss not in LOSSES:
        raise UserError(f"config.loss={config.loss!r}: choose one of {', '.join(LOSSES)}")
    return partial(preference.cdpo, label_smoothing=config.label_smoothing) if config.loss == "cdpo" else LOSSES[config.loss]


def main(config, run):
    loss_of(config)
    train, _, where, start = common.preference_rows(config, run)
    with common.open_mesh(config) as mesh:
        base = launch.load(start, default="sft", mesh=mesh)
        columns, report = pairs.encode_pairs(base.tokenizer, train, config.data.length)
        pack.check_report(report, where)
        columns = common.trimmed(columns)
        common.print_report(run, where, report)
        common.check_length(base.model, config.data.length, "config.data.length")
        common.check_batch(config, report["rows"])
        score = jax.jit(partial(preference.sequence_logps, base.model))
        columns = with_reference_logps(score, base.params["policy"], columns, config.batch_size)
        tx, schedule = common.optimizer(config)
        # a copy: the step donates its parameters, and the reference's belong to `base`
        state, frozen = common.new_state({"policy": jax.tree.map(jnp.copy, base.params["policy"])}, tx, mesh)
        loss_fn = preference.loss(base.model, loss_of(config), beta=config.beta, nll_weight=config.nll_weight)
        final: dict[str, float] = {}
        common.fit(
            config, run, mesh=mesh, columns=columns, tokenizer=base.tokenizer, model=base.model, state=state, frozen=frozen,
            step_fn=common.jit_step(loss_fn, tx, state, config.accumulate), schedule=schedule,
            tokens_per_step=2 * config.batch_size * config.data.length, last=final,
            turns=base.meta.get("turns", 1),
        )  # fmt: skip
    run.finish(final, [], then=f"chat --run={run.workdir}")


if __name__ == "__main__":
    launch.run(main, "dpo")
