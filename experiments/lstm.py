"""Pretrain a recurrent language model: an LSTM on next tokens, or ELMo's two LSTMs on next and previous tokens.

python -m experiments.lstm                                        # CPU size, embedded text, about a minute
python -m experiments.lstm --config=configs/lstm.py:tiny-elmo     # both directions
python -m experiments.lstm --config=configs/lstm.py:zaremba-medium --config.data.path=corpus.jsonl

The data and the batches are those of experiments.pretrain, so the two losses can be compared: with the default configs and seed 0
3.50 held out with 370,304 parameters here, 2.61 with 319,968 there.
"""

from __future__ import annotations

from experiments import common, pretrain
from jaxllm import launch
from jaxllm.core.types import UserError
from jaxllm.losses import bilm, lm
from jaxllm.models import recurrent
from jaxllm.report.files import read_jsonl

KINDS = {  # family -> (config class, the model of a config, its objective)
    "lstm": (recurrent.LSTMConfig, recurrent.make, lm.loss),
    "elmo": (recurrent.BiLSTMConfig, recurrent.make_elmo, bilm.loss),
}


def tokens_per_second(run, tokens_per_step):
    """The mean over training after the first logged step, evaluations included; 0 when there was no other."""
    rows = [r for r in read_jsonl(run.path("metrics.jsonl")) if "train/loss" in r]
    if len(rows) < 2 or rows[-1]["t"] <= rows[0]["t"]:
        return 0.0
    return tokens_per_step * (rows[-1]["step"] - rows[0]["step"]) / (rows[-1]["t"] - rows[0]["t"])


def main(config, run):
    if config.family not in KINDS:
        raise UserError(f"config.family={config.family!r}: choose one of {', '.join(KINDS)}")
    kind, make, loss = KINDS[config.family]
    # what cannot work is said before the text is read
    recurrent.validate(common.model_config(config, kind, config.vocab_size))
    common.check_batch(config, config.batch_size)
    train, held_out = pretrain.corpus(config, run)
    tokenizer = pretrain.tokenizer_of(config, train)
    model = make(common.model_config(config, kind, tokenizer.vocab_size))
    parameters = recurrent.published_count(model.config)
    run.note(f"model: {parameters:,} parameters, vocabulary of {tokenizer.vocab_size:,}")
    columns, report = pretrain.rows(config, run, tokenizer, train, "train")
    eval_columns, _ = pretrain.rows(config, run, tokenizer, held_out or train[:1], "held out")
    loss_fn = loss(model)
    with common.open_mesh(config) as mesh:
        params = common.born_sharded(model.specs, config.seed, mesh)
        final = common.fit_lm(
            config, run, mesh=mesh, model=model, params=params, tokenizer=tokenizer, rows=columns, eval_rows=eval_columns,
            loss_fn=loss_fn, eval_loss=lambda params, batch, _: loss_fn(params, batch, None),
        )  # fmt: skip
    speed = tokens_per_second(run, config.batch_size * config.data.length)
    run.note(f"eval loss {final['eval/loss']:.3f} with {parameters:,} parameters, {speed:,.0f} tokens/s")
    then = f"chat --run={run.workdir}" if config.family == "lstm" else ""
    run.finish({**final, "parameters": parameters, "perf/tokens_per_second": speed, "data/fill": report["fill"]}, [], then=then)


if __name__ == "__main__":
    launch.run(main, "lstm")
