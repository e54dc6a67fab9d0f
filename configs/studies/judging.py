"""Judging: eight models of known worth, a simulated judge with known biases."""

import ml_collections


def get_config(variant=None):
    c = ml_collections.ConfigDict()
    full = variant == "full"
    c.seed = 0
    c.seeds = 30 if full else 5
    c.models = 8
    c.battles = 3000
    c.step = 0.35  # log-odds between neighbours in true worth: 61 rating points
    c.position_bias = 0.2  # added to the probability of the side shown first
    c.length_bias = 0.5  # log-odds for one standard deviation more length
    c.shuffles = 100
    c.resamples = 1000 if full else 200
    return c
