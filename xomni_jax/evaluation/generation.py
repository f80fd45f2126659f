"""The drawing of a suite's images: prompts in static batches, the next batch sampled while the last one's images are fetched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
from PIL import Image

from xomni_jax.evaluation.batches import Batch, item_keys, make_batches, row_indices
from xomni_jax.evaluation.suite import Item, SuiteError
from xomni_jax.pipeline import XOmni
from xomni_jax.sampling.keys import NOISE
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.sharding.arrays import whole

Drawn = list[tuple[Item, list[Image.Image]]]


@dataclass(frozen=True)
class DrawConfig:
    """How images are drawn.

    Attributes:
      repeats: images per prompt.
      batch: images sampled at a time, decode_batch: images decoded at a time, by each data-parallel part of the mesh.
    """

    height: int
    width: int
    seed: int
    sampling: SamplingConfig
    repeats: int
    batch: int
    decode_batch: int


class Generation:
    """Draws the items of one suite with one model."""

    def __init__(self, model: XOmni, suite: str, config: DrawConfig):
        self.model, self.suite, self.config = model, suite, config
        self.grid = model.grid(config.height, config.width)
        R = config.repeats
        self.at_once = max(r for r in range(1, R + 1) if R % r == 0 and (r == 1 or r <= config.batch))  # repeats in one call
        self.rows = max(1, config.batch // self.at_once) * model.ways

    def batches(self, items: Sequence[Item]) -> list[Batch]:
        """Static batches of prompts. SuiteError names an item whose prompt cannot be drawn."""
        return make_batches(items, [self._length(item) for item in items], self.rows)

    def overlong(self, items: Sequence[Item]) -> list[str]:
        """Ids of the prompts that are drawn whole, but decoded to pixels from their beginning: the text encoders take no more."""
        limit = self.model.decode_config.text_length - 1
        return [item.id for item in items if self.model.decoder_tokens(item.prompt) > limit]

    def draw(self, batches: Sequence[Batch]) -> Iterator[Drawn]:
        """The images of each batch, in order. One batch is under way while the caller has the one before it."""
        waiting = None
        for batch in batches:
            started = batch, self._start(batch)
            if waiting is not None:
                yield self._fetch(*waiting)
            waiting = started
        if waiting is not None:
            yield self._fetch(*waiting)

    def _length(self, item: Item) -> int:
        if not item.prompt.strip():
            raise SuiteError(f"{self.suite}: the prompt of item {item.id} is empty; correct the data")
        try:
            return len(self.model.tokenizer.generation_prompt(item.prompt, *self.grid))
        except ValueError as e:
            raise SuiteError(f"{self.suite}: item {item.id}: {e}") from None

    def _start(self, batch: Batch) -> list[jax.Array]:
        """Dispatches the sampling and decoding of a batch; nothing is waited for."""
        c, items, R = self.config, batch.filled, self.config.repeats
        prompts, ids = [item.prompt for item in items], [item.id for item in items]
        keys_PR = item_keys(c.seed, self.suite, ids, R, 0)
        parts = [
            self.model.sample_codes(prompts, self.grid, keys_PR[:, r : r + self.at_once], c.sampling, batch.length)["codes"]
            for r in range(0, R, self.at_once)
        ]
        codes_BYX = jax.numpy.concatenate(parts, axis=1).reshape(-1, *self.grid)
        noise_keys = item_keys(c.seed, self.suite, ids, R, NOISE).reshape(-1)
        texts = [prompt for prompt in prompts for _ in range(R)]
        images = []
        for index in row_indices(len(batch.items) * R, c.decode_batch * self.model.ways):
            noise_BTC = self.model.noise(noise_keys[index], self.grid)
            images.append(self.model.decode_images(codes_BYX[index], [texts[i] for i in index], noise_BTC))
        return images

    def _fetch(self, batch: Batch, parts: Sequence[jax.Array]) -> Drawn:
        images = [Image.fromarray(image) for part in parts for image in whole(part)]
        R = self.config.repeats
        return [(item, images[k * R : (k + 1) * R]) for k, item in enumerate(batch.items)]
