"""Pretrain a decoder on the pixels of images, then ask by linear probes what each of its layers knows of their classes.

python -m experiments.imagegpt                                    # CPU size, drawn images, about two minutes
python -m experiments.imagegpt --config=configs/imagegpt.py:imagegpt-small --config.data.path=cifar.npz

As in "Generative pretraining from pixels" (Chen et al. 2020): raster order, a palette by k-means, features that are the mean over
positions of what enters a layer. Expected after the short training of CPU size: the upper layers tell ten drawn classes apart
in 0.30 of the images, raw pixels in 0.24, an untrained network in 0.21; which layer is best is reported and not claimed (in the
paper a middle one, after a million steps). The page shows generated images and completions.
"""

from __future__ import annotations

import json
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import common
from jaxllm import launch
from jaxllm.core import spec
from jaxllm.core.types import UserError
from jaxllm.data import images
from jaxllm.evals.probe import probe
from jaxllm.generate.decode import generate
from jaxllm.models import decoder, families
from jaxllm.report import figures
from jaxllm.report.run import at_least
from jaxllm.worlds import images as world


class Data(NamedTuple):
    """Palette indices [n, h, w] and labels (or None) of the images to train on and of those held out; colours [c, 3]."""

    train: np.ndarray
    held_out: np.ndarray
    labels: np.ndarray | None
    held_out_labels: np.ndarray | None
    palette: np.ndarray


def prepare(config, run):
    """The config's images, or drawn ones, in palette colours."""
    c = config.data
    if c.path:
        found = images.read(c.path, size=c.size)
    else:
        colours = min(c.colours, len(world.COLOURS))
        drawn = world.draw(c.images, config.seed, size=c.size, noise=c.noise, colours=colours)
        found = images.Images(world.palette()[drawn.pixels], drawn.shape, world.SHAPES)
    kept, out = common.hold_out(list(range(len(found.pixels))), c.held_out, config.seed)
    if found.pixels.ndim == 4:
        palette = images.kmeans(found.pixels[kept], c.colours, config.seed)
        indices = images.quantise(found.pixels, palette)
    else:
        indices, palette = found.pixels, np.stack([np.arange(c.colours) * 255 // max(1, c.colours - 1)] * 3, axis=-1)
        if indices.max() >= c.colours:
            raise UserError(f"{c.path}: palette index {indices.max()}, data.colours={c.colours}: raise it")
    n, height, width = indices.shape
    if height * width > config.model.max_length:
        raise UserError(
            f"images of {height} x {width} are {height * width} pixels, more than model.max_length={config.model.max_length}: "
            "raise it, or use smaller images"
        )
    run.note(f"images: {len(kept):,} to train on, {len(out):,} held out, {height} x {width} pixels of {c.colours} colours")
    labels = [None if found.labels is None else found.labels[i] for i in (kept, out)]
    return Data(indices[kept], indices[out], *labels, palette.astype(np.uint8))


# ---- linear probes


def layer_features(model, params, indices, colours, rows=100):
    """float32 [layers + 1, n, d]: the mean over positions of every layer's input, and of the final hidden states."""

    @jax.jit
    def one(params, tokens):
        out = model.apply(params, tokens, taps=("layer_inputs",))
        every = jnp.concatenate([out.aux["layer_inputs"], out.hidden[None]])
        return every.astype(jnp.float32).mean(axis=2)

    tokens = images.records(indices, colours)["tokens"]
    return np.concatenate([one(params, tokens[i : i + rows]) for i in range(0, len(tokens), rows)], axis=1)


def probes(config, run, model, params, data):
    """Accuracy of probes {name: [per layer [per seed]]}, with a plot: the trained network, an untrained one, raw pixels."""
    p, colours = config.probe, len(data.palette)
    if data.labels is None or not p.rows:
        return {}
    parts = (data.train[: p.rows], data.held_out[: p.test_rows])
    y, test_y = data.labels[: p.rows], data.held_out_labels[: p.test_rows]
    classes = int(max(data.labels.max(), data.held_out_labels.max())) + 1
    score = partial(probe, y=y, test_y=test_y, classes=classes, seeds=p.seeds)
    found = {}
    for name, weights in (("trained", params), ("untrained", spec.init(model.specs, jax.random.key(config.seed + 1)))):
        sides = [layer_features(model, weights, part, colours) for part in parts]
        found[name] = [score(x=x, test_x=test_x) for x, test_x in zip(*sides, strict=True)]
    raw = [np.eye(colours, dtype=np.float32)[part].reshape(len(part), -1) for part in parts]
    found["raw pixels"] = [score(x=raw[0], test_x=raw[1])] * len(found["trained"])
    layers = list(range(len(found["trained"])))
    lines = {name: (layers, [float(np.mean(a)) for a in rows]) for name, rows in found.items()}
    title = f"Linear probes of {classes} classes, mean of {p.seeds} seeds"
    run.figure("probe", figures.line_plot(lines, title, "layer whose input is read (the last: final states)", "accuracy"))
    return found


# ---- pictures


def pictures(config, run, model, params, data):
    """figures/samples.png: drawn from the model; figures/completions.png: an image, its upper half, and two completions."""
    n, (_, height, width) = config.samples, data.train.shape
    length, colours = height * width, len(data.palette)
    tokens = images.records(data.held_out[:n], colours)["tokens"]
    n = len(tokens)

    def draw(prompt, seed):
        lengths = np.full(len(prompt), prompt.shape[1])
        sample = jax.jit(partial(generate, model, max_new_tokens=length + 1 - prompt.shape[1]))
        out = sample(params, prompt, lengths, jax.random.key(seed)).tokens
        return np.asarray(out)[:, 1 : length + 1].reshape(-1, height, width)

    shown = np.concatenate([data.palette, np.full((1, 3), 160, np.uint8)])  # one more colour, for what is not given

    def save(name, indices):
        sheet = images.grid(shown[indices], n, scale=max(1, 60 // width))
        run.path("figures", f"{name}.png").write_bytes(images.png(sheet))

    save("samples", np.concatenate([draw(tokens[:, :1], seed) for seed in (0, 1)]))
    given = height // 2 * width
    upper = data.held_out[:n].copy()
    upper.reshape(n, -1)[:, given:] = colours
    halves = [draw(tokens[:, : given + 1], seed) for seed in (0, 1)]
    save("completions", np.concatenate([data.held_out[:n], upper, *halves]))


def main(config, run):
    data = prepare(config, run)
    colours = len(data.palette)
    config.data.length = data.train.shape[1] * data.train.shape[2]
    settings = {**config.model.to_dict(), "vocab_size": colours + 1, "n_outputs": colours}
    model = decoder.make(families.build(decoder.DecoderConfig, settings))
    run.note(f"model: {decoder.published_count(model.config):,} parameters")
    run.path("palette.json").write_text(json.dumps(data.palette.tolist()), encoding="utf-8")
    with common.open_mesh(config) as mesh:
        final = common.fit_lm(
            config, run, mesh=mesh, model=model, params=common.born_sharded(model.specs, config.seed, mesh),
            tokenizer=images.word_tokenizer([str(i) for i in range(colours)]),
            rows=images.records(data.train, colours), eval_rows=images.records(data.held_out, colours),
        )  # fmt: skip
    params = launch.load(run.workdir).params["policy"]
    metrics = {**final, "eval/bits_per_pixel": final["eval/loss"] / math.log(2)}
    found = probes(config, run, model, params, data)
    pictures(config, run, model, params, data)
    run.finish(*verdict(metrics, found))


def verdict(metrics, found):
    """(metrics with the probes' accuracies, claims about them)."""
    if not found:
        return metrics, []
    mean = {name: [float(np.mean(a)) for a in rows] for name, rows in found.items()}
    layer = int(np.argmax(mean["trained"]))
    best, raw, untrained = max(mean["trained"]), mean["raw pixels"][0], max(mean["untrained"])
    metrics |= {"probe/best": best, "probe/best_layer": layer, "probe/raw_pixels": raw, "probe/untrained": untrained}
    claims = [
        at_least("best layer over raw pixels, accuracy", best - raw, 0.03),
        at_least("best layer over the best of an untrained network, accuracy", best - untrained, 0.05),
    ]
    return metrics, claims


if __name__ == "__main__":
    launch.run(main, "imagegpt")
