"""Learning from completions that are labelled good or bad one by one (KTO, BCO), from a fine-tuned model.

    python -m experiments.kto --config.init=runs/sft --config.data.path=rows.jsonl

Rows are {prompt, completion, label}; a preference pair (chosen, rejected; HH's form too) gives two. Without a file: pairs of the
instr world, judged by its simulated annotator. With these and seed 0 the loss went from 0.50 to 0.42, the margin from 0 to 0.69.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax

from experiments import common, memory, reading
from jaxllm import launch
from jaxllm.core.types import UserError
from jaxllm.data import pack, unpaired
from jaxllm.losses import preference
from jaxllm.train import gates
from jaxllm.train.annotate import map_batches

LOSSES = {"kto": preference.kto, "bco": preference.bco, "apo_zero_unpaired": preference.apo_zero_unpaired}


def objective(config):
    """model -> LossFn of the config's loss."""
    if config.loss not in LOSSES:
        raise UserError(f"config.loss={config.loss!r}: choose one of {', '.join(LOSSES)}")
    weights = dict(desirable_weight=config.desirable_weight, undesirable_weight=config.undesirable_weight)
    return partial(preference.row_loss, fn=LOSSES[config.loss], beta=config.beta, **(weights if config.loss == "kto" else {}))


def labelled_rows(config, run):
    """(rows, where they come from, the SFT run to start from). The user's file is read first."""
    path = config.data.path
    given = reading.checked(config, run, path, unpaired.normalise_rows) if path else []
    rows = [row for pair in given for row in pair]
    common.check_batch(config, len(rows) or config.batch_size)
    start = common.need("sft", config.init, config, run)
    if path:
        return rows, path, start
    collected = Path(common.need("pairs", "", config, run, init=start)) / "train.jsonl"
    return [r for pair in common.named_pairs(collected) for r in unpaired.from_pair(pair)], str(collected), start


def with_reference(model, params, columns, batch_size):
    """The columns with ref_logps and ref_mismatched_logps [n], and without the padding that no row uses."""
    columns = common.trimmed(columns)
    score = jax.jit(partial(preference.sequence_logps, model))
    own, other = (map_batches(score, params, columns[side], batch_size) for side in ("completion", "mismatched"))
    return columns | {"ref_logps": own, "ref_mismatched_logps": other}


def main(config, run):
    build = objective(config)
    rows, where, start = labelled_rows(config, run)
    with common.open_mesh(config) as mesh:
        base = launch.load(start, default="sft", mesh=mesh)
        columns, report = unpaired.encode_unpaired(base.tokenizer, rows, config.data.length)
        pack.check_report(report, where, base.tokenizer)
        common.print_report(run, where, report)
        run.note(f"{report['good']:,} good rows, {report['bad']:,} bad ones")
        common.check_length(base.model, config.data.length, "config.data.length")
        common.check_batch(config, report["rows"])
        columns = with_reference(base.model, base.params["policy"], columns, config.batch_size)
        tx, schedule = common.optimizer(config)
        own = common.adapted(config, base.model, base.params["policy"], mesh, kept=False)
        loss_fn, params = build(own.model), {"policy": own.params}
        step = memory.Step(own.model, "policy", own.trainable, loss_fn, columns, params=params)
        state, frozen, step_fn = memory.begin(config, step, loss_fn, tx, mesh)
        final: dict[str, float] = {}
        common.fit(
            config, run, mesh=mesh, columns=columns, tokenizer=base.tokenizer, model=base.model, state=state, frozen=frozen,
            step_fn=step_fn, schedule=schedule,
            tokens_per_step=2 * config.batch_size * columns["completion"]["tokens"].shape[1], last=final,
            turns=base.meta.get("turns", 1), checks=(gates.start(gates.UNPAIRED), gates.moved()),
        )  # fmt: skip
    run.finish(final, [], then=f"chat --run={run.workdir}")


if __name__ == "__main__":
    launch.run(main, "kto")
