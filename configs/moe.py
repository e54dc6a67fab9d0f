"""Mixture of experts. Variants: switch, shared, loss-free (CPU size), and presets with experts: mixtral-8x7b, deepseek-v3, ..."""

from dataclasses import replace

import ml_collections
from ml_collections import config_dict

from configs.common import model_settings, text_data, training
from jaxllm.core.types import UserError
from jaxllm.models.moe import MoEConfig
from jaxllm.models.presets import PRESETS, TINY

# the active width is that of the dense tiny model, 256
SMALL = {
    "tiny": MoEConfig(8, 2, 128),
    "switch": MoEConfig(8, 1, 256, normalise=False, capacity_factor=1.25),
    "shared": MoEConfig(16, 3, 64, n_shared=1),
    "loss-free": MoEConfig(8, 2, 128, scoring="sigmoid", bias=True),
}


def get_config(variant=None):
    name = variant or "tiny"
    large = {n: p for n, p in PRESETS.items() if p.moe is not None}
    if name not in SMALL | large:
        raise UserError(f"unknown variant {name!r}: choose one of {', '.join(SMALL | large)}")
    model = large.get(name) or replace(TINY, moe=SMALL[name])
    c = training(steps=200, batch_size=32, lr=3e-3, eval_every=100)
    c.optim.warmup = 20
    c.dense = False  # train the dense twin of equal active FLOPs instead
    c.compare = False  # then train the dense twin too
    balanced_by_bias = model.moe.bias
    c.router = ml_collections.ConfigDict()
    c.router.load_balance = 1e-4 if balanced_by_bias else 1e-2  # weight of the load-balancing loss
    c.router.z = 0.0 if balanced_by_bias else 1e-3  # weight of the router z-loss
    c.router.bias_rate = 1e-3 if name in large else 1e-2  # step of the correction bias, where model.moe.bias
    c.mtp = 0.3  # weight of multi-token prediction, where model.mtp_layers
    text_data(c, length=64 if name in SMALL else 4096, vocab_size=model.vocab_size, characters=1_200_000)
    c.model = model_settings(model)
    c.model.moe.capacity_factor = model.moe.capacity_factor or config_dict.placeholder(float)  # empty: nothing is dropped
    if name in large:
        c.optim.lr, c.optim.warmup, c.steps, c.batch_size, c.log_every, c.eval_every = 3e-4, 2000, 100_000, 256, 100, 1000
    return c
