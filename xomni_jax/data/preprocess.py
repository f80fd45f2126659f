"""Images to the pixels that the released tokenizer takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from xomni_jax.data.images import to_rgb


class ImageRejected(ValueError):
    """An image is too small or too elongated for the limits."""


@dataclass(frozen=True)
class ImageLimits:
    """Accepted images and the size they are resized to; names and defaults are those of the released configuration.

    Attributes:
      short_size: smaller short sides are scaled up to this
      long_size: larger long sides are then scaled down to this
      patch_size: both sides become multiples of it
      min_short_size: images with a smaller short side are rejected
      max_aspect_ratio: images with a larger ratio of long to short side are rejected
    """

    short_size: int = 384
    long_size: int = 1152
    patch_size: int = 16
    min_short_size: int = 128
    max_aspect_ratio: float = 3.0

    def __post_init__(self) -> None:
        if not self.patch_size <= self.short_size <= self.long_size:
            raise ValueError(
                f"ImageLimits: patch_size={self.patch_size} <= short_size={self.short_size} <= long_size={self.long_size} "
                "does not hold; correct the image limits"
            )


RELEASED = ImageLimits()


def trained_limits(sizes: Sequence[tuple[int, int]], patch: int) -> ImageLimits:
    """The limits of a tokenizer that learns on images of these (height, width): an image is scaled to what it has seen.

    Half of the smallest side may be enlarged; up to 4 times as long as wide is accepted, or what the longest of `sizes` is.
    """
    sides = [side for size in sizes for side in size]
    ratio = max(max(size) / min(size) for size in sizes)
    return ImageLimits(min(sides), max(sides), patch, min(sides) // 2, max(4.0, ratio))


def target_size(width: int, height: int, limits: ImageLimits = RELEASED) -> tuple[int, int]:
    """(width, height) in pixels that an image of this size is resized to.

    Sides are rounded to the nearest multiple of the patch, halves to the even multiple (Python's `round`).

    Raises:
      ImageRejected: short side or aspect ratio outside the limits, or a side that rounds to nothing.
    """
    short, long, what = min(width, height), max(width, height), f"image of {width} x {height}"
    if short < max(limits.min_short_size, 1):
        raise ImageRejected(f"{what}: the short side is below {limits.min_short_size} pixels; use a larger image")
    if long / short > limits.max_aspect_ratio:
        raise ImageRejected(f"{what}: the aspect ratio {long / short:.2f} exceeds {limits.max_aspect_ratio:g}; crop the image")
    # Rounded only at the end, as in the released code: rounding in between would change some sizes by a patch.
    sides = (float(width), float(height))
    if min(sides) < limits.short_size:
        sides = tuple(side * (limits.short_size / min(sides)) for side in sides)
    if max(sides) > limits.long_size:
        sides = tuple(side * (limits.long_size / max(sides)) for side in sides)
    rounded = tuple(round(side / limits.patch_size) * limits.patch_size for side in sides)
    if not all(rounded):
        raise ImageRejected(f"{what}: a side shrinks below one patch of {limits.patch_size} pixels; crop the image")
    return rounded


def to_pixels(image: np.ndarray) -> np.ndarray:
    """uint8 [..., C] -> float32 in [-1, 1], by (x / 255 - 0.5) / 0.5."""
    half = np.float32(0.5)
    return (np.asarray(image).astype(np.float32) / np.float32(255) - half) / half


def preprocess(image: Image.Image | np.ndarray, limits: ImageLimits = RELEASED) -> np.ndarray:
    """An image (PIL, or uint8 [H, W, 3]) -> pixels float32 [H', W', 3] in [-1, 1]: as `to_rgb` gives it, resized (bicubic) and scaled.

    Raises:
      ImageRejected: see `target_size`.
      ValueError: an array that is not uint8 [H, W, 3].
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(f"image array is {image.dtype} {image.shape}; pass uint8 [height, width, 3] or a PIL image")
        image = Image.fromarray(image)
    image = to_rgb(image)
    return to_pixels(np.asarray(image.resize(target_size(*image.size, limits), Image.Resampling.BICUBIC)))


def token_grid(width: int, height: int, limits: ImageLimits = RELEASED) -> tuple[int, int]:
    """(Y, X) token rows and columns of an image of this size after `preprocess`."""
    w, h = target_size(width, height, limits)
    return h // limits.patch_size, w // limits.patch_size
