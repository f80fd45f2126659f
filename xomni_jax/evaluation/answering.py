"""Greedy answers to a suite's questions about images, in batches of fixed shapes (see `generation` for why)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import jax
import numpy as np
from PIL import Image

from xomni_jax.data.preprocess import ImageLimits, preprocess, token_grid
from xomni_jax.evaluation.generation import SHORTEST
from xomni_jax.evaluation.suite import Item, SuiteError
from xomni_jax.pipeline import XOmni
from xomni_jax.sampling.batches import Batch, batches_by_shape, run_batches
from xomni_jax.sequence.padding import IMAGE_STEPS, bucket

OPENERS = 4  # threads that read images


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

    def answer(self, items: Sequence[Item]) -> Iterator[list[tuple[Item, str, bool]]]:
        """Batch by batch (item, answer, whether its image had to be changed); images are opened while the device answers.

        Raises:
          SuiteError: an item cannot be asked.
        """
        fitted: dict[int, bool] = {}
        with ThreadPoolExecutor(OPENERS) as pool:

            def start(batch: Batch) -> jax.Array:
                opened = list(pool.map(self._open, [items[i] for i in batch.items]))
                fitted.update(zip(batch.items, (changed for _, changed in opened)))
                codes = dict(zip(batch.items, self.model.encode_ragged([pixels for pixels, _ in opened])))
                questions = batch.take([item.prompt for item in items])
                return self.model.answer_ids(batch.take(codes), questions, self.max_tokens, batch.shape)

            lengths = [self._length(*pair) for pair in zip(items, pool.map(self._grid, items))]
            batches = batches_by_shape([bucket(max(SHORTEST, n), IMAGE_STEPS) for n in lengths], self.rows)
            for batch, ids_BT in run_batches(start, batches):
                answers = [self.model.tokenizer.decode_text(ids_T).strip() for ids_T in ids_BT]
                yield [(items[i], answer, fitted[i]) for i, answer in zip(batch.items, answers)]

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
