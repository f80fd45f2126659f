"""Greedy answers to a suite's questions about images, in batches of fixed shapes (see `generation` for why)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from PIL import Image

from xomni_jax.data.preprocess import ImageLimits, preprocess, token_grid
from xomni_jax.evaluation.generation import SHORTEST
from xomni_jax.evaluation.suite import Item, Suite, SuiteError
from xomni_jax.pipeline import XOmni
from xomni_jax.sampling.batches import Batch, batches_by_shape, run_batches
from xomni_jax.sequence.padding import IMAGE_STEPS, bucket

READERS = 4  # threads that read images


def answer(model: XOmni, suite: Suite, batch_size: int, items: Sequence[Item]) -> Iterator[list[tuple[Item, str, bool]]]:
    """Batch by batch (item, answer, whether its image had to be changed); images are read while the device answers.

    Args:
      batch_size: questions at a time, by each data-parallel part of the mesh.

    Raises:
      SuiteError: an image cannot be read, or a question cannot be asked.
    """
    limits, fitted = model.preprocess_config, dict[int, bool]()

    def image_of(item: Item) -> Image.Image:
        try:
            return item.image().convert("RGB")
        except SuiteError:
            raise
        except (OSError, ValueError) as e:
            raise SuiteError(f"{suite.name}: the image of item {item.id} cannot be read ({e}); fetch it again") from None

    def length(item: Item) -> int:
        grid = token_grid(*fitted_sizes(image_of(item).size, limits)[1], limits)
        try:
            return len(model.tokenizer.understanding_prompt(np.zeros(grid, np.int32), item.prompt))
        except ValueError as e:
            raise SuiteError(f"{suite.name}: item {item.id}: {e}") from None

    def pixels_of(i: int) -> np.ndarray:
        image, fitted[i] = fit(image_of(items[i]), limits)
        return preprocess(image, limits)

    with ThreadPoolExecutor(READERS) as pool:

        def start(batch: Batch) -> jax.Array:
            codes = dict(zip(batch.items, model.encode_ragged(list(pool.map(pixels_of, batch.items)))))
            questions = batch.take([item.prompt for item in items])
            return model.answer_ids(batch.take(codes), questions, suite.max_new_tokens, batch.shape)

        shapes = [bucket(max(SHORTEST, n), IMAGE_STEPS) for n in pool.map(length, items)]
        for batch, ids_BT in run_batches(start, batches_by_shape(shapes, batch_size * model.num_data_shards)):
            answers = [model.tokenizer.decode_text(ids_T).strip() for ids_T in ids_BT]
            yield [(items[i], text, fitted[i]) for i, text in zip(batch.items, answers)]


def fitted_sizes(size: tuple[int, int], limits: ImageLimits) -> tuple[tuple[int, int], tuple[int, int]]:
    """(width, height) -> the canvas that its image is pasted on, and the size that the canvas is enlarged to."""
    least = math.ceil(max(size) / limits.max_aspect_ratio)
    canvas = max(size[0], least), max(size[1], least)
    scale = max(1.0, limits.min_short_size / min(canvas))
    return canvas, tuple(max(limits.min_short_size, int(side * scale)) for side in canvas)


def fit(image: Image.Image, limits: ImageLimits) -> tuple[Image.Image, bool]:
    """The RGB image as the tokenizer takes it, and whether it had to be changed for that.

    Benchmarks hold images that the released limits refuse, such as a single cropped word: they are padded with white to the most
    elongated shape that is accepted, then enlarged until the short side is.
    """
    canvas, enlarged = fitted_sizes(image.size, limits)
    if image.size == enlarged:
        return image, False
    padded = Image.new("RGB", canvas, "white")
    padded.paste(image, ((canvas[0] - image.width) // 2, (canvas[1] - image.height) // 2))
    return padded.resize(enlarged, Image.Resampling.BICUBIC), True
