"""Answering questions about images with a frozen decoder. Variant flamingo-3b: the bridge of the paper's smallest model."""

import dataclasses

import ml_collections

from configs.common import training
from jaxllm.models.flamingo import VisionConfig


def get_config(variant=None):
    if variant not in (None, "flamingo-3b"):
        raise ValueError(f"unknown variant {variant!r}: flamingo-3b, or none for CPU size")
    c = training(steps=1000, batch_size=64, lr=3e-3, log_every=20, eval_every=500)
    c.optim.warmup = 20
    c.init = ""  # a pretraining run, <dir>[@step], whose decoder is frozen; empty: train one on the world's sentences first
    c.trainable = r"^policy/(resampler|cross_layers)/"
    c.data = ml_collections.ConfigDict()
    c.data.images = 8000  # drawn; each with one question
    c.data.test = 400  # held out, each with one question
    c.data.length = 16  # tokens of a question and its answer
    c.vision = ml_collections.ConfigDict(dict(steps=1200, batch_size=64, lr=2e-3))  # pretraining of the vision encoder
    c.model = ml_collections.ConfigDict(dict(d_vision=64, n_latents=8, resampler_layers=1, every=1, n_heads=4))
    c.model.vision = ml_collections.ConfigDict(dataclasses.asdict(VisionConfig()))
    if variant:
        # arXiv 2204.14198, table 5 and appendix A: over a decoder of 1.4 B (24 layers of width 2048), given as config.init
        c.model.update(dict(d_vision=1536, n_latents=64, resampler_layers=6, every=1, n_heads=16))
        c.model.vision.update(dict(n_layers=24, n_heads=16))
        c.steps, c.batch_size, c.optim.lr, c.optim.warmup, c.log_every = 500_000, 1024, 1e-4, 5000, 100
    return c
