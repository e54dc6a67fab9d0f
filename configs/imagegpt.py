"""Pretraining on pixels, then linear probes. Variants: imagegpt-small, imagegpt-medium, imagegpt-large (published sizes)."""

import ml_collections

from configs.common import model_settings, training
from jaxllm.models.decoder import DecoderConfig
from jaxllm.models.presets import preset

# ImageGPT's shape at 81 pixels of 4 colours
TINY = DecoderConfig(
    vocab_size=5, n_outputs=4, max_length=81, d_model=64, n_layers=6, n_heads=4, d_ff=256, positions="learned",
    norm="rmsnorm", activation="quick_gelu", bias=True, tied=False, unroll=True,
)  # fmt: skip


def get_config(variant=None):
    c = training(steps=800, batch_size=32, lr=4e-3, eval_every=400)
    c.optim.warmup = 20
    model = preset(variant) if variant else TINY
    c.data = ml_collections.ConfigDict()
    c.data.path = ""  # .npz, .npy, .jsonl or a directory of pictures; empty: the drawn world of jaxllm.worlds.images
    c.data.images = 12_000  # drawn, when path is empty
    c.data.size = 32 if variant else 9  # pixels of a side, of drawn images and of pictures in a directory
    c.data.noise = 0.01  # share of drawn pixels that are any colour
    c.data.colours = model.vocab_size - 1  # of the palette, found by k-means where images are RGB
    c.data.held_out = 0.05
    c.data.length = 0  # pixels of an image: found in the data
    c.probe = ml_collections.ConfigDict(dict(rows=2000, test_rows=1000, seeds=3))  # labelled images; rows=0: no probe
    c.samples = 10  # generated images, and as many completions
    c.model = model_settings(model)
    del c.model["n_outputs"]  # the palette's
    if variant:
        # Chen et al. 2020, section 3.2: a million steps at batch 128, Adam with b2 0.95, no weight decay
        c.optim.lr, c.optim.warmup, c.optim.final, c.optim.weight_decay = 3e-3, 2000, 0.0, 0.0
        c.steps, c.batch_size, c.log_every, c.eval_every = 1_000_000, 128, 100, 10_000
    return c
