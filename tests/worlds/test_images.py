"""The drawn images: reproducible, balanced, and what is said of them is what is drawn."""

import numpy as np
import pytest

from jaxllm.core.types import UserError
from jaxllm.worlds import images

PICTURES = images.draw(400, seed=3)


def test_the_same_seed_draws_the_same_and_another_does_not():
    again, other = images.draw(400, seed=3), images.draw(400, seed=4)
    for a, b in zip(PICTURES, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (PICTURES.pixels != other.pixels).mean() > 0.3


def test_classes_are_balanced_and_colours_differ_from_their_ground():
    assert set(np.bincount(PICTURES.shape)) == {40}
    assert (PICTURES.colour != PICTURES.ground).all()
    assert PICTURES.pixels.max() < len(images.COLOURS) == len(images.palette())


def test_without_noise_a_picture_is_its_bitmap_at_its_place():
    clean = images.draw(60, seed=1, noise=0.0)
    for i in range(60):
        s, y, x = clean.scale[i], clean.top[i], clean.left[i]
        expected = np.full((12, 12), clean.ground[i])
        expected[y : y + s, x : x + s][images.bitmap(images.SHAPES[clean.shape[i]], s)] = clean.colour[i]
        np.testing.assert_array_equal(clean.pixels[i], expected)


def test_noise_touches_the_share_it_should():
    clean, noisy = images.draw(500, seed=1, noise=0.0), images.draw(500, seed=1, noise=0.2)
    # one colour in eight is the one that was there
    assert (clean.pixels != noisy.pixels).mean() == pytest.approx(0.2 * 7 / 8, abs=0.01)


def test_no_two_shapes_look_alike():
    maps = {images.bitmap(name, s).tobytes() for name in images.SHAPES for s in images.SCALES}
    assert len(maps) == len(images.SHAPES) * len(images.SCALES)


def test_words_say_what_is_drawn():
    names = list(images.COLOURS)
    for i in range(50):
        said = {k: answer for k, (_, answer) in images.questions(PICTURES, i).items()}
        assert said["colour"] == names[PICTURES.colour[i]] and said["ground"] == names[PICTURES.ground[i]]
        assert said["shape"] == images.SHAPES[PICTURES.shape[i]]
        row, column = said["place"].split()
        assert (row == "bottom") == (PICTURES.top[i] + PICTURES.scale[i] / 2 >= 6)
        assert (column == "right") == (PICTURES.left[i] + PICTURES.scale[i] / 2 >= 6)
        caption = said["caption"].split()
        assert caption[1:3] == [said["colour"], said["shape"]] and caption[4] == said["ground"]
        assert caption[-2:] == said["place"].split() and caption[0] == ("an" if said["colour"] == "orange" else "a")
    assert len({images.place(PICTURES, i) for i in range(50)}) == 4


def test_a_class_is_not_readable_from_single_pixels():
    """The nearest mean image of a class, the best that counting colours at places can do simply, stays near chance."""
    train, test = images.draw(3000, seed=0), images.draw(500, seed=1)
    hot = lambda p: np.eye(8)[p.pixels].reshape(len(p.pixels), -1)  # noqa: E731
    x = hot(train)
    means = np.stack([x[train.shape == k].mean(axis=0) for k in range(10)])
    distance = (means**2).sum(-1)[None] - 2 * hot(test) @ means.T
    assert (distance.argmin(axis=1) == test.shape).mean() < 0.3


def test_fewer_colours_and_what_cannot_be_drawn():
    few = images.draw(100, seed=0, size=9, colours=3, noise=0.3)
    assert few.pixels.shape == (100, 9, 9) and set(np.unique(few.pixels)) == {0, 1, 2}
    assert (few.colour != few.ground).all()
    for bad in ({"size": 4}, {"colours": 1}, {"colours": 9}):
        with pytest.raises(UserError, match="drawn images of"):
            images.draw(10, seed=0, **bad)
