"""The images of a suite's prompts, in batches of fixed shapes.

An image must not depend on which items happen to be drawn beside it. A row of a batch depends on its own prompt and keys alone, but
programs of other shapes may round differently: so a prompt is padded to a length that its own length decides, and every batch has the
same number of rows. Then an item drawn alone equals the item in any batch, to the bit.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from xomni_jax.data.preprocess import to_pixels
from xomni_jax.evaluation.measurement import code_agreement
from xomni_jax.evaluation.run import EvalConfig
from xomni_jax.evaluation.suite import Item, Suite, SuiteError
from xomni_jax.pipeline import XOmni
from xomni_jax.sampling.batches import Batch, batches_by_shape, in_order, make_batches, run_batches
from xomni_jax.sampling.keys import NOISE
from xomni_jax.sequence.padding import bucket

SHORTEST = 32  # tokens that prompts are padded to at least


class Generation:
    """Draws the items of one suite with one model. `settings` is what decides the images, for the record."""

    def __init__(self, model: XOmni, suite: Suite, config: EvalConfig):
        self.model, self.suite, self.config, inference = model, suite, config, config.inference
        own = model.description.get("settings", {}).get("size", {})
        height, width = suite.size or (own.get("height", 1152), own.get("width", 1152))
        height, width = inference.height or height, inference.width or width
        self.grid = model.grid(height, width)
        self.sampling = inference.sampling
        R, batch = suite.repeats, inference.batch
        self.per_call = config.repeats_per_call or max(r for r in range(1, R + 1) if R % r == 0 and (r == 1 or r <= batch))
        self.rows, self.decode_rows = max(1, batch // self.per_call) * model.num_data_shards, inference.decode_batch * model.num_data_shards
        self.settings = {"height": height, "width": width, "seed": config.seed, "sampling": dataclasses.asdict(self.sampling)}
        self.settings |= {"repeats": R, "batch": batch, "decode_batch": inference.decode_batch}
        self.settings |= {name: on for name in ("repeats_per_call", "reconstruct", "reencode") if (on := getattr(config, name))}

    def draw(self, items: Sequence[Item]) -> Iterator[list[tuple[Item, list[Image.Image], dict[str, Any]]]]:
        """Batch by batch (item, images, what else is recorded of it); the device draws the next batch meanwhile.

        "overlong" marks a prompt that is drawn whole, but decoded to pixels from its beginning: the text encoder takes no more.

        Raises:
          SuiteError: the prompt of an item cannot be drawn.
        """
        limit = self.model.decode_config.text_length - 1
        batches = batches_by_shape([bucket(max(SHORTEST, self._length(item))) for item in items], self.rows)
        for batch, (images_PRHWC, codes_PRYX) in run_batches(lambda batch: self._start(batch, items), batches):
            more = [{"overlong": self.model.decoder_tokens(items[i].prompt) > limit} for i in batch.items]
            if self.config.reencode:
                again = self._encode(images_PRHWC.reshape(-1, *images_PRHWC.shape[2:])).reshape(codes_PRYX.shape)
                more = [m | {"agreement": row_R.tolist()} for m, row_R in zip(more, code_agreement(codes_PRYX, again))]
            drawn = [[Image.fromarray(image) for image in images_RHWC] for images_RHWC in images_PRHWC]
            yield [(items[i], *one) for i, *one in zip(batch.items, drawn, more)]

    def _length(self, item: Item) -> int:
        if not item.prompt.strip():
            raise SuiteError(f"{self.suite.name}: the prompt of item {item.id} is empty; correct the data")
        try:
            return len(self.model.tokenizer.generation_prompt(item.prompt, *self.grid))
        except ValueError as e:
            raise SuiteError(f"{self.suite.name}: item {item.id}: {e}") from None

    def _start(self, batch: Batch, items: Sequence[Item]) -> tuple[jax.Array, jax.Array]:
        """Dispatches a batch without waiting for it: images [P, R, H, W, 3] and codes [P, R, Y, X] of its P items."""
        seed, R, P = self.config.seed, self.suite.repeats, len(batch.items)
        prompts, ids = batch.take([item.prompt for item in items]), batch.take([item.id for item in items])
        if self.config.reconstruct:
            codes_BYX = jnp.asarray(self._encode(np.stack([np.asarray(items[i].image()) for i in batch.items])))
        else:
            keys_PR = self.suite.keys(seed, ids, R, 0)
            calls = [keys_PR[:, r : r + self.per_call] for r in range(0, R, self.per_call)]
            parts = [self.model.sample_codes(prompts, self.grid, keys, self.sampling, batch.shape)["codes"] for keys in calls]
            codes_BYX = jnp.concatenate(parts, axis=1).reshape(-1, *self.grid)
        noise_keys = self.suite.keys(seed, ids, R, NOISE).reshape(-1)
        texts = [prompt for prompt in prompts for _ in range(R)]
        images = []
        for part in make_batches(P * R, self.decode_rows):
            noise_BTC = self.model.noise(part.take(noise_keys), self.grid)
            images.append(self.model.decode_images(part.take(codes_BYX), part.take(texts), noise_BTC))
        images_BHWC = jnp.concatenate(images)[: P * R]
        return images_BHWC.reshape(P, R, *images_BHWC.shape[1:]), codes_BYX[: P * R].reshape(P, R, *self.grid)

    def _encode(self, images_BHWC: np.ndarray) -> np.ndarray:
        """Codes [B, Y, X] of uint8 images of one size."""
        program = lambda part: self.model.encode_pixels(to_pixels(part.take(images_BHWC)))
        return np.stack(in_order(run_batches(program, make_batches(len(images_BHWC), self.decode_rows))))


def item_keys(seed: int, suite: str, ids: Sequence[str], repeats: int, purpose: int) -> jax.Array:
    """One key per item and repeat [P, R], from (seed, purpose, suite, id, repeat): any image can be drawn again alone."""
    digests = [hashlib.sha256(f"{suite}\n{name}".encode()).digest()[:8] for name in ids]
    words_P2 = np.frombuffer(b"".join(digests), ">u4").reshape(-1, 2).astype(np.uint32)
    return _fold(np.uint32(seed), words_P2, repeats, purpose)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _fold(seed: Any, words_P2: Any, repeats: int, purpose: int) -> jax.Array:
    root = jax.random.fold_in(jax.random.key(seed), purpose)

    def of_item(words):
        key = jax.random.fold_in(jax.random.fold_in(root, words[0]), words[1])
        return jax.vmap(lambda r: jax.random.fold_in(key, r))(jnp.arange(repeats))

    return jax.vmap(of_item)(words_P2)
