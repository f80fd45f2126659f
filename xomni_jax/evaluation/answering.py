"""The answering of a suite's questions: images to codes one shape at a time, questions in static batches, greedy answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from PIL import Image

from xomni_jax.data.preprocess import ImageLimits, preprocess, token_grid
from xomni_jax.evaluation.batches import Batch, make_batches, row_indices
from xomni_jax.evaluation.suite import Item, SuiteError
from xomni_jax.pipeline import XOmni
from xomni_jax.sharding.arrays import whole

STEPS = 4  # buckets per octave: a prompt is mostly its image, and the prefill is most of the work
OPENERS = 4  # threads that read images

Answered = list[tuple[Item, str, bool]]


def fitted_sizes(size: tuple[int, int], limits: ImageLimits) -> tuple[tuple[int, int], tuple[int, int]]:
    """(width, height) -> the canvas that its image is pasted on, and the size that the canvas is enlarged to."""
    least = math.ceil(max(size) / limits.max_aspect_ratio)
    canvas = max(size[0], least), max(size[1], least)
    scale = max(1.0, limits.min_short_size / min(canvas))
    return canvas, tuple(max(limits.min_short_size, int(side * scale)) for side in canvas)


def fit(image: Image.Image, limits: ImageLimits) -> tuple[Image.Image, bool]:
    """The image as the tokenizer takes it, and whether it had to be changed for that.

    Benchmarks hold images that the released limits refuse, such as a single cropped word: they are padded with white to the most
    elongated shape that is accepted, then enlarged until the short side is.
    """
    image = image.convert("RGB")
    canvas, enlarged = fitted_sizes(image.size, limits)
    if image.size == enlarged:
        return image, False
    padded = Image.new("RGB", canvas, "white")
    padded.paste(image, ((canvas[0] - image.width) // 2, (canvas[1] - image.height) // 2))
    return padded.resize(enlarged, Image.Resampling.BICUBIC), True


class Answering:
    """Answers the items of one suite with one model.

    Args:
      batch: questions at a time, by each data-parallel part of the mesh.
      max_tokens: of an answer.
    """

    def __init__(self, model: XOmni, suite: str, batch: int, max_tokens: int):
        self.model, self.suite, self.max_tokens, self.rows = model, suite, max_tokens, batch * model.ways

    def batches(self, items: Sequence[Item]) -> list[Batch]:
        """Static batches of questions. SuiteError names an item that cannot be asked."""
        with ThreadPoolExecutor(OPENERS) as pool:
            grids = list(pool.map(self._grid, items))
        return make_batches(items, [self._length(item, grid) for item, grid in zip(items, grids)], self.rows, STEPS)

    def answer(self, batches: Sequence[Batch]) -> Iterator[Answered]:
        """The answers of each batch, in order. The images of the next batch are opened meanwhile."""
        with ThreadPoolExecutor(OPENERS) as pool:
            opening = None
            for number, batch in enumerate(batches):
                opened = opening or [pool.submit(self._open, item) for item in batch.items]
                following = batches[number + 1].items if number + 1 < len(batches) else ()
                opening = [pool.submit(self._open, item) for item in following]
                images = [future.result() for future in opened]
                codes = self._encode([pixels for pixels, _ in images])
                filled = [codes[i] for i in row_indices(len(codes), batch.rows)[0]]
                answers = self.model.answer(filled, [item.prompt for item in batch.filled], self.max_tokens, batch.length)
                yield [(item, text, changed) for item, text, (_, changed) in zip(batch.items, answers, images)]

    def _grid(self, item: Item) -> tuple[int, int]:
        limits = self.model.preprocess_config
        with self._reading(item):
            return token_grid(*fitted_sizes(item.image().size, limits)[1], limits)

    def _length(self, item: Item, grid: tuple[int, int]) -> int:
        try:
            return len(self.model.tokenizer.understanding_prompt(np.zeros(grid, np.int32), item.prompt))
        except ValueError as e:
            raise SuiteError(f"{self.suite}: item {item.id}: {e}") from None

    def _open(self, item: Item) -> tuple[np.ndarray, bool]:
        with self._reading(item):
            image, changed = fit(item.image(), self.model.preprocess_config)
        return preprocess(image, self.model.preprocess_config), changed

    @contextmanager
    def _reading(self, item: Item) -> Iterator[None]:
        try:
            yield
        except SuiteError:
            raise
        except (OSError, ValueError) as e:
            raise SuiteError(f"{self.suite}: the image of item {item.id} cannot be read ({e}); fetch it again") from None

    def _encode(self, pixels: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Codes [Y, X] of each image; images of one shape fill the data-parallel parts of the mesh, one each."""
        codes: list[np.ndarray | None] = [None] * len(pixels)
        shapes = sorted({p.shape for p in pixels})
        for shape in shapes:
            alike = [i for i, p in enumerate(pixels) if p.shape == shape]
            for first in range(0, len(alike), self.model.ways):
                part = alike[first : first + self.model.ways]
                for i, found in zip(part, whole(self.model.encode_pixels(np.stack([pixels[i] for i in part])))):
                    codes[i] = found
        return codes
