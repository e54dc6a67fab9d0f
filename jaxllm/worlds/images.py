"""Small palette images of one shape whose class, colour, place and size are known, with words about them.

A shape of ten stands somewhere on a plain ground, in some size and colour, under a little noise. No pixel by itself tells the
class: colours, place and size are drawn independently of it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxllm.core.types import UserError

COLOURS = {  # name -> red, green, blue
    "black": (20, 20, 20), "white": (245, 245, 245), "red": (220, 50, 47), "green": (60, 160, 60),
    "blue": (40, 90, 200), "yellow": (240, 200, 40), "purple": (140, 70, 180), "orange": (240, 130, 30),
}  # fmt: skip
SHAPES = ("square", "frame", "disc", "ring", "triangle", "plus", "cross", "diamond", "bars", "checker")
ROWS, COLUMNS = ("top", "bottom"), ("left", "right")
SCALES = (5, 6, 7)


class Pictures(NamedTuple):
    """pixels uint8 [n, h, w], indices into COLOURS; shape, colour, ground, scale, top, left: int [n]; the last two in pixels."""

    pixels: np.ndarray
    shape: np.ndarray
    colour: np.ndarray
    ground: np.ndarray
    scale: np.ndarray
    top: np.ndarray
    left: np.ndarray


def palette() -> np.ndarray:
    """uint8 [colours, 3]."""
    return np.array(list(COLOURS.values()), np.uint8)


def bitmap(shape: str, scale: int) -> np.ndarray:
    """bool [scale, scale]: where a shape is drawn."""
    y, x = np.mgrid[:scale, :scale]
    r = scale - 1
    u, v = 2 * x - r, 2 * y - r  # from -r to r
    far = np.maximum(abs(u), abs(v))
    disc = u * u + v * v <= r * r + r
    return {
        "square": far <= r,
        "frame": far == r,
        "disc": disc,
        "ring": disc & (u * u + v * v > (r - 2) ** 2 + r - 2),
        "triangle": abs(u) <= (v + r) / 2,
        "plus": np.minimum(abs(u), abs(v)) <= 1,
        "cross": abs(u) == abs(v),
        "diamond": abs(u) + abs(v) <= r,
        "bars": y % 2 == 0,
        "checker": (x + y) % 2 == 0,
    }[shape]


def draw(n: int, seed: int, *, size: int = 12, noise: float = 0.03, colours: int = len(COLOURS)) -> Pictures:
    """n pictures of size x size pixels in the first `colours` of COLOURS, the shapes in equal numbers and in random order.

    `noise` of the pixels are any colour. UserError when the size cannot hold a shape, or there are not so many colours.
    """
    if size < SCALES[0] or not 2 <= colours <= len(COLOURS):
        raise UserError(f"drawn images of {size} pixels in {colours} colours: from {SCALES[0]} pixels, and 2 to {len(COLOURS)}")
    rng = np.random.default_rng(seed)
    shape = rng.permutation(np.arange(n) % len(SHAPES))
    colour = rng.integers(0, colours, n)
    ground = (colour + rng.integers(1, colours, n)) % colours
    scale = rng.choice([s for s in SCALES if s <= size], n)
    top, left = (np.floor(rng.random(n) * (size - scale + 1)).astype(int) for _ in range(2))
    maps = {(k, s): bitmap(name, s) for k, name in enumerate(SHAPES) for s in SCALES}
    pixels = np.repeat(ground, size * size).reshape(n, size, size)
    for i in range(n):
        s = scale[i]
        pixels[i, top[i] : top[i] + s, left[i] : left[i] + s][maps[shape[i], s]] = colour[i]
    wrong = rng.random(pixels.shape) < noise
    pixels[wrong] = rng.integers(0, colours, int(wrong.sum()))
    return Pictures(pixels.astype(np.uint8), shape, colour, ground, scale, top, left)


def place(p: Pictures, i: int) -> str:
    """Where the shape's middle is: "top left"."""
    half = p.pixels.shape[1] / 2
    row, column = (int(start[i] + p.scale[i] / 2 >= half) for start in (p.top, p.left))
    return f"{ROWS[row]} {COLUMNS[column]}"


def caption(p: Pictures, i: int) -> str:
    """ "a red ring on black at the top left"."""
    names = list(COLOURS)
    colour = names[p.colour[i]]
    article = "an" if colour[0] in "aeiou" else "a"
    return f"{article} {colour} {SHAPES[p.shape[i]]} on {names[p.ground[i]]} at the {place(p, i)}"


def questions(p: Pictures, i: int) -> dict[str, tuple[str, str]]:
    """{attribute: (question, answer)} about a picture."""
    names = list(COLOURS)
    return {
        "colour": ("what colour is the shape?", names[p.colour[i]]),
        "ground": ("what colour is the ground?", names[p.ground[i]]),
        "shape": ("what shape is it?", SHAPES[p.shape[i]]),
        "place": ("where is it?", place(p, i)),
        "caption": ("describe the picture.", caption(p, i)),
    }
