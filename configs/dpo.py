"""Direct preference optimisation."""

import ml_collections

from configs.common import training


def get_config(variant=None):
    c = training(steps=80, batch_size=64, lr=2e-4)
    c.optim.warmup = 5
    c.optim.weight_decay = 0.0
    c.init = ""  # an SFT run, <dir>[@step]; empty: train one first
    c.loss = "dpo"  # dpo, cdpo, reference_free
    c.label_smoothing = 0.1  # cdpo's share of flipped labels
    c.beta = 0.2
    c.nll_weight = 0.2
    c.data = ml_collections.ConfigDict()
    c.data.path = ""  # preference rows; empty: pairs from the SFT run, judged by the simulated annotator
    c.data.eval_path = ""  # rows kept for judging; empty: a tenth of path's
    c.data.length = 64
    return c
