"""Preference optimisation on pairs. Variants: losses that want other settings than DPO's (ipo, simpo, orpo, ...)."""

import ml_collections

from configs.common import lora, training
from jaxllm.core.types import UserError

ALONE = {"nll_weight": 0.0}
# what differs from the settings below; docs/preference.md says what each setting is to each loss
VARIANTS = {
    "dpo": {}, "cdpo": {}, "robust": {}, "ipo": {"beta": 0.5} | ALONE, "hinge": ALONE, "exo_pair": ALONE, "nca_pair": ALONE,
    "bco_pair": ALONE, "sppo_hard": {"beta": 0.1} | ALONE, "aot": ALONE, "apo_zero": ALONE, "apo_down": ALONE, "discopop": ALONE,
    "alpha_divergence": ALONE, "simpo": {"beta": 2.0} | ALONE, "alphapo": {"beta": 2.0, "alpha": 0.25} | ALONE,
    "orpo": {"beta": 0.1, "nll_weight": 1.0}, "cpo": {"beta": 0.1, "nll_weight": 1.0}, "unlikelihood": ALONE, "wpo": ALONE,
    "ld_dpo": ALONE,
}  # fmt: skip


def get_config(variant=None):
    name = variant or "dpo"
    if name not in VARIANTS:
        raise UserError(f"unknown variant {name!r}: choose one of {', '.join(VARIANTS)}, or set config.loss")
    c = training(steps=80, batch_size=64, lr=2e-4)
    c.optim.warmup = 5
    c.optim.weight_decay = 0.0
    lora(c)
    c.init = ""  # an SFT run, <dir>[@step]; empty: train one first
    c.loss = name  # a name of docs/preference.md
    c.beta = 0.2
    c.nll_weight = 0.2  # of the chosen completion's NLL per token
    c.hyper = ml_collections.ConfigDict()  # what some of the losses take beyond beta
    c.hyper.label_smoothing = 0.1  # cdpo, robust, exo_pair: the share of flipped labels
    c.hyper.gamma = 1.0  # simpo, alphapo: the target margin
    c.hyper.alpha = 0.5  # alpha_divergence, alphapo, unlikelihood, ld_dpo
    c.hyper.tau = 0.05  # discopop
    c.data = ml_collections.ConfigDict()
    c.data.path = ""  # preference rows; empty: pairs from the SFT run, judged by the simulated annotator
    c.data.on_error = "stop"  # at a bad row; or skip: leave out at most 1 % of the rows
    c.data.eval_path = ""  # rows kept for judging; empty: a tenth of path's
    c.data.length = 64
    for key, value in VARIANTS[name].items():
        setattr(c.hyper if key in c.hyper else c, key, value)
    return c
