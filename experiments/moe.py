"""Pretrain a mixture of experts, and its dense twin of equal active FLOPs when asked.

python -m experiments.moe                                         # CPU size, 8 experts of which a token takes 2
python -m experiments.moe --config.compare=True                   # then the dense model too, and both losses
python -m experiments.moe --config=configs/moe.py:switch          # one expert a token, with a capacity; also :loss-free, :shared
python -m experiments.moe --config=configs/moe.py:mixtral-8x7b --config.data.path=corpus.jsonl --config.mesh.expert=8

With the default config and seed 0: eval loss 2.97 with 763,872 parameters, of which a token passes 321,504, and 3.09 dense.
moe/load_max and moe/load_min (the busiest and the idlest expert's load over an even share), moe/drops and
moe/router_entropy say how tokens are spread.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial

import jax

from experiments import common, pretrain
from jaxllm import launch
from jaxllm.core.types import UserError
from jaxllm.losses import lm
from jaxllm.models import decoder, moe
from jaxllm.models.decoder import DecoderConfig
from jaxllm.train.partition import router_bias


def active_width(c: DecoderConfig) -> int:
    """The feed-forward width that one token passes."""
    return c.d_ff if c.moe is None else (c.moe.top_k + c.moe.n_shared) * c.moe.d_ff


def dense_twin(c: DecoderConfig) -> DecoderConfig:
    """The dense model with the same FLOPs for a token, but for the router's."""
    if c.dense_layers and c.d_ff != active_width(c):
        raise UserError(
            f"model.dense_layers={c.dense_layers}: no dense twin has equal FLOPs in all layers; set it to 0 to compare"
        )
    return replace(c, moe=None, dense_layers=0, d_ff=active_width(c))


def active_count(c: DecoderConfig) -> int:
    """The number of parameters that one token passes, without padding rows of the vocabulary."""
    if c.moe is None:
        return decoder.published_count(c)
    experts = moe.specs(c.moe, c.activation, c.d_model, 1.0)["experts"]
    idle = sum(math.prod(s.shape) for s in jax.tree.leaves(experts)) // c.moe.n_experts * (c.moe.n_experts - c.moe.top_k)
    return decoder.published_count(c) - idle * (c.n_layers - c.dense_layers + c.mtp_layers)


def config_of(config, vocab_size: int) -> DecoderConfig:
    """The model of the config, or its dense twin; UserError when it cannot be built or its router would not learn."""
    c = common.model_config(config, DecoderConfig, vocab_size)
    if c.moe is None:
        raise UserError("config.model.moe is missing: for a dense model run experiments.pretrain")
    moe.validate(c.moe)
    if c.moe.top_k == 1 and c.moe.normalise:
        raise UserError(
            "model.moe.top_k=1 with normalise=True makes every weight 1, and the router learns nothing: set it to False"
        )
    if config.compare or config.dense:
        twin = dense_twin(c)
        c = twin if config.dense else c
    decoder.validate(c)
    return c


def objective(config, model):
    """Next-token prediction with the router's losses."""
    c, weights = model.config, {}
    if c.moe is not None:
        weights = {"load_balance": config.router.load_balance, "router_z": config.router.z}
        if c.moe.bias:  # losses are averaged over layers; each layer's bias is to feel its own sign
            weights["bias_step"] = float(c.n_layers - c.dense_layers + (c.mtp_layers if config.mtp else 0))
    return lm.loss(model, router=weights, mtp=config.mtp if c.mtp_layers else 0.0)


def optimizer(config, c: DecoderConfig):
    """(AdamW, its schedule), with plain sign steps for the routers' biases where there are any."""
    biased = c.moe is not None and c.moe.bias
    return common.optimizer(config, around=partial(router_bias, rate=config.router.bias_rate) if biased else None)


def train_dense(config, run) -> dict[str, float]:
    """The dense twin, trained in a run directory of its own: its last evaluation."""
    twin = copy.deepcopy(config)
    with twin.unlocked():
        twin.dense, twin.compare = True, False
    workdir = run.path("dense")
    command = f"{run.command} --config.dense=True --config.compare=False --workdir={workdir}"
    return launch.execute(main, "moe", twin, workdir, command, {}, stage_of=run.workdir)["metrics"]


def main(config, run):
    # what cannot work is said before the text is read
    config_of(config, config.vocab_size)
    common.check_batch(config, config.batch_size)
    train, held_out = pretrain.corpus(config, run)
    tokenizer = pretrain.tokenizer_of(config, train)
    model = decoder.make(config_of(config, tokenizer.vocab_size))
    counts = {"parameters": decoder.published_count(model.config), "parameters_active": active_count(model.config)}
    run.note(
        f"model: {counts['parameters']:,} parameters, {counts['parameters_active']:,} for one token, "
        f"vocabulary of {tokenizer.vocab_size:,}"
    )
    columns, report = pretrain.rows(config, run, tokenizer, train, "train")
    eval_columns, _ = pretrain.rows(config, run, tokenizer, held_out or train[:1], "held out")
    with common.open_mesh(config) as mesh:
        params = common.born_sharded(model.specs, config.seed, mesh)
        final = common.fit_lm(
            config, run, mesh=mesh, model=model, params=params, tokenizer=tokenizer, rows=columns, eval_rows=eval_columns,
            loss_fn=objective(config, model), tx=optimizer(config, model.config),
        )  # fmt: skip
    final = {**final, **counts, "data/fill": report["fill"]}
    if config.compare:
        dense = train_dense(config, run)
        final |= {"dense/eval/loss": dense["eval/loss"], "dense/parameters": dense["parameters"]}
        run.note(f"eval loss {final['eval/loss']:.4f} with experts, {dense['eval/loss']:.4f} dense, at equal active FLOPs")
    run.finish(final, [], then=f"chat --run={run.workdir}")


if __name__ == "__main__":
    launch.run(main, "moe")
