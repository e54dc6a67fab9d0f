"""Learning from completions that are labelled good or bad."""

import ml_collections

from configs.common import lora, training


def get_config(variant=None):
    c = training(steps=80, batch_size=64, lr=2e-4)
    c.optim.warmup = 5
    c.optim.weight_decay = 0.0
    lora(c)
    c.init = ""  # an SFT run, <dir>[@step]; empty: train one first
    c.loss = "kto"  # kto, bco, apo_zero_unpaired
    c.beta = 0.2
    c.desirable_weight = 1.0  # kto: of good rows; balance weight x rows where one kind is rare
    c.undesirable_weight = 1.0  # kto: of bad rows
    c.data = ml_collections.ConfigDict()
    c.data.path = ""  # labelled rows, or pairs; empty: pairs from the SFT run, judged by the simulated annotator
    c.data.on_error = "stop"  # at a bad row; or skip: leave out at most 1 % of the rows
    c.data.length = 64
    return c
