"""Released preprocessing against PIL by hand: sizes, rejection, values."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from tests.parity import released
from xomni_jax.data.preprocess import (
    RELEASED,
    ImageLimits,
    ImageRejected,
    preprocess,
    target_size,
    to_pixels,
    token_grid,
    trained_limits,
)

TINY = trained_limits(((32, 64), (32, 128)), 8)


@pytest.mark.parametrize(
    "size, want",
    [
        ((1152, 1152), (1152, 1152)),
        ((640, 480), (640, 480)),
        ((200, 150), (512, 384)),  # up to a short side of 384
        ((3000, 1500), (1152, 576)),  # down to a long side of 1152
        ((150, 450), (384, 1152)),  # up, to exactly both limits
        ((500, 1000), (496, 992)),  # 31.25 and 62.5 patches: 62.5 rounds to the even 62
        ((392, 408), (384, 416)),  # 24.5 -> 24 and 25.5 -> 26
        ((129, 128), (384, 384)),  # 387 -> 24.1875 patches
        ((2000, 700), (1152, 400)),  # 403.2 -> 25.2
    ],
)
def test_sizes(size, want):
    assert target_size(*size) == want
    assert token_grid(*size) == (want[1] // 16, want[0] // 16)


def test_sizes_of_other_limits():
    assert target_size(64, 32, TINY) == (64, 32) and target_size(128, 32, TINY) == (128, 32)
    assert target_size(20, 20, TINY) == (32, 32) and target_size(300, 100, TINY) == (128, 40)


@pytest.mark.parametrize("sizes", [((64, 64),), ((32, 64), (32, 128)), ((64, 96), (96, 64)), ((32, 192),), ((1152, 1152), (768, 1536))])
def test_limits_of_training_keep_what_was_trained(sizes):
    limits = trained_limits(sizes, 8)
    for height, width in sizes:
        assert target_size(width, height, limits) == (width, height)
    smallest, largest = min(map(min, sizes)), max(map(max, sizes))
    assert target_size(smallest // 2, smallest // 2, limits) == (smallest, smallest)
    assert max(target_size(3 * largest, 2 * largest, limits)) == largest


def test_rejection_says_why():
    with pytest.raises(ImageRejected, match="image of 127 x 300: the short side is below 128 pixels"):
        target_size(127, 300)
    with pytest.raises(ImageRejected, match="aspect ratio 3.01 exceeds 3; crop"):
        target_size(602, 200)
    with pytest.raises(ImageRejected, match="shrinks below one patch"):
        target_size(4000, 9, ImageLimits(min_short_size=1, max_aspect_ratio=1000))
    with pytest.raises(ValueError, match="image array is float64"):
        preprocess(np.zeros((200, 200, 3)))
    with pytest.raises(ValueError, match="patch_size=16 <= short_size=384 <= long_size=100"):
        ImageLimits(long_size=100)


def test_values_are_pils_bicubic(rng):
    image = Image.fromarray(rng.integers(0, 256, (150, 203, 3), dtype=np.uint8))
    pixels = preprocess(image)
    by_hand = np.asarray(image.resize((512, 384), Image.Resampling.BICUBIC), np.float32)
    assert pixels.shape == (384, 512, 3) and pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, by_hand / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(pixels, preprocess(np.asarray(image)))


def test_other_modes_become_rgb():
    for mode in ("L", "RGBA", "P", "1"):
        assert preprocess(Image.new(mode, (50, 40), 1), TINY).shape == (40, 48, 3)


def _accepted(width: int, height: int, limits: ImageLimits) -> tuple[int, int] | None:
    try:
        return target_size(width, height, limits)
    except ImageRejected:
        return None


@pytest.mark.parametrize("limits", [RELEASED, ImageLimits(**released.LIMITS)], ids=["released", "small"])
def test_any_size_is_treated_as_by_the_released_code(limits, rng):
    """Sizes around the limits against the program written from the description, refusals included."""
    taken, tries = 0, 200 if limits.long_size < 500 else 50  # large images take their time
    for _ in range(tries):
        height = int(np.exp(rng.uniform(np.log(limits.min_short_size * 0.9), np.log(limits.long_size * 1.5))))
        width = max(1, int(height * np.exp(rng.uniform(-1.2, 1.2))))
        image = Image.fromarray(rng.integers(0, 256, (2, 3, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.NEAREST)
        theirs = released.preprocess(image, dataclasses.asdict(limits))
        assert _accepted(width, height, limits) == (None if theirs is None else theirs.shape[1::-1]), (width, height)
        if theirs is not None:
            taken += 1
            np.testing.assert_array_equal(preprocess(image, limits), theirs)
    assert 0.4 * tries < taken < tries


@pytest.mark.parametrize("size", [(127, 128), (128, 127), (128, 385), (385, 128), (128, 384), (1, 1), (383, 1153), (1153, 383)], ids=str)
def test_the_limits_themselves(size):
    theirs = released.preprocess(Image.new("RGB", size), dataclasses.asdict(RELEASED))
    assert _accepted(*size, RELEASED) == (None if theirs is None else theirs.shape[1::-1])


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "YCbCr"])
def test_every_mode_is_treated_as_by_the_released_code(mode, rng):
    image = Image.fromarray(rng.integers(0, 256, (151, 203, 3), dtype=np.uint8)).convert(mode)
    np.testing.assert_array_equal(preprocess(image), released.preprocess(image, dataclasses.asdict(RELEASED)))


@pytest.mark.parity
def test_pixels_are_those_of_torch(rng):
    """ToTensor and Normalize(0.5, 0.5), bit for bit."""
    import torch

    levels = rng.integers(0, 256, (7, 5, 3), dtype=np.uint8)
    tensor = torch.from_numpy(levels).permute(2, 0, 1).to(torch.float32).div(255).sub(0.5).div(0.5)
    np.testing.assert_array_equal(to_pixels(levels), tensor.permute(1, 2, 0).numpy())
