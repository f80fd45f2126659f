"""Image files as a viewer shows them, in 8-bit RGB: the one reader of chat, training data, evaluation and scoring services."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "PPM")  # others of Pillow's run programs or are not images of a screen
MAX_PIXELS = 1 << 26
_ORIENTATION = 0x0112  # the tag of EXIF; from 5 on, sides are exchanged


class UnreadableImage(ValueError):
    """A file is no image that can be read. The message gives the reason alone, to follow the name of the file."""


class TooManyPixels(UnreadableImage):
    """An image is larger than the limit."""


def read_image(
    file: bytes | str | Path, *, as_stored: bool = False, max_pixels: int = MAX_PIXELS, formats: Sequence[str] = FORMATS
) -> Image.Image:
    """An encoded image, or the file that holds it -> RGB image; of an animation its first frame. See `to_rgb`.

    The kind of file is decided by its bytes, and pixels are counted from the header, before any of them is decoded.

    Raises:
      UnreadableImage: there is no such file, or it is no image of `formats`, is damaged or cut off, or holds too many pixels.
    """
    with _reasons(formats):
        data = file if isinstance(file, bytes) else _path(file).read_bytes()
        image = _open(io.BytesIO(data), max_pixels, formats)
        if image.format == "PNG":  # it alone has check sums, after which it has to be opened again
            image.verify()
            image = _open(io.BytesIO(data), max_pixels, formats)
        ImageFile.LOAD_TRUNCATED_IMAGES = False  # other packages set it, and a cut file would be grey below
        image.load()
        return to_rgb(image, as_stored)


def image_size(file: bytes | str | Path) -> tuple[int, int]:
    """(width, height) of the upright image, from the header of its file alone. UnreadableImage as far as the header tells."""
    with _reasons(FORMATS), io.BytesIO(file) if isinstance(file, bytes) else _path(file).open("rb") as stream:
        image = _open(stream, MAX_PIXELS, FORMATS)
        return image.size[::-1] if image.getexif().get(_ORIENTATION, 1) >= 5 else image.size


def _path(file: str | Path) -> Path:
    return Path(file) if isinstance(file, str) else file  # which may be one in a bucket


def _open(stream: BinaryIO, max_pixels: int, formats: Sequence[str]) -> Image.Image:
    image = Image.open(stream, formats=formats)
    if image.width * image.height > max_pixels:
        raise TooManyPixels(f"it has {image.width} x {image.height} pixels, the limit is {max_pixels} in all")
    return image


@contextmanager
def _reasons(formats: Sequence[str]) -> Iterator[None]:
    """Whatever goes wrong becomes an UnreadableImage."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow's: what matters becomes an error, and the limit of pixels is stricter than its own
            yield
    except UnreadableImage:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, far above ours
        raise TooManyPixels(f"it has too many pixels, the limit is {MAX_PIXELS} in all") from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"it is none of {', '.join(formats)}, or of a rare kind of these") from error
    except Exception as error:  # noqa: BLE001 - decoders of damaged files raise whatever they meet
        if isinstance(error, OSError) and error.strerror:
            raise UnreadableImage(error.strerror) from error
        reason = (str(error).splitlines() or [""])[0]
        raise UnreadableImage(f"it is damaged or cut off ({reason or type(error).__name__})") from error


def to_rgb(image: Image.Image, as_stored: bool = False) -> Image.Image:
    """An image of any mode -> RGB: turned as its EXIF orientation says, wide samples scaled to 8 bits, transparent parts on white.

    Args:
      as_stored: Pillow's `convert("RGB")` and nothing else, as the released program does it: not turned, samples above 255 clipped,
        transparency dropped.
    """
    if as_stored:
        return image.convert("RGB")
    tags = getattr(image, "tag_v2", {})
    # A photograph whose EXIF data are damaged is shown as it is stored.
    with suppress(SyntaxError, ValueError, KeyError, TypeError, OSError):
        if image.getexif().get(_ORIENTATION, 1) != 1:  # or else it would be copied
            image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        image = _eight_bits(image, tags)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _eight_bits(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """An image of wide samples (modes I;16, I, F) by the range of their values -> L, or LA where a value stands for transparent.

    16 bits have the range that their format gives them. Wider integers and floats may hold values of a smaller one: the first of the
    usual ranges that holds them all is taken. Negative values begin at black.
    """
    bits, kind, white_is_zero = tags.get(258, (16,))[0], tags.get(339, (1,))[0], tags.get(262) == 0  # of a TIFF file
    values = np.asarray(image)
    if image.mode == "I" and tags and kind == 1:
        values = values.view(np.uint32)  # which Pillow reads as signed
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise UnreadableImage("it holds values that are not finite numbers")
    low, high = min(values.min(), 0.0), values.max()
    if image.mode.startswith("I;16") or bits < 16 or kind == 2 and bits == 16:
        tops = [2 ** (bits - (kind == 2)) - 1]
    else:
        tops = ([] if image.mode == "I" else [1]) + [2**8 - 1, 2**16 - 1, 2**31 - 1, 2**32 - 1]
    top = next((top for top in tops if high <= top), high)
    levels = np.rint((values - low) * (255 / (top - low))).astype(np.uint8)
    levels = 255 - levels if white_is_zero else levels
    if "transparency" not in image.info:
        return Image.fromarray(levels)
    alpha = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
    return Image.fromarray(np.stack([levels, alpha], -1))
