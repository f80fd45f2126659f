"""Held-out prompts, and images of them from two policies that share one tokenizer and one decoder, in static shapes."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xomni_jax.data.preprocess import to_pixels
from xomni_jax.data.rendered import RenderedConfig, render_example
from xomni_jax.evaluation.cells import EvaluationError
from xomni_jax.pipeline import XOmni
from xomni_jax.sampling.decoder import DECODER_COMPONENTS
from xomni_jax.sampling.keys import NOISE, image_keys
from xomni_jax.sampling.logits import SamplingConfig

POLICIES = ("sft", "rl")
SAMPLER_ROWS = 256  # rollouts in one call of the sampler
Chunk = tuple[np.ndarray, np.ndarray | None, np.ndarray | None]


@dataclass(frozen=True)
class Signs:
    """Held-out signs: real images uint8 [P, H, W, 3], captions and targets."""

    images: np.ndarray
    captions: tuple[str, ...]
    targets: tuple[dict[str, Any], ...]

    def items(self, samples: int) -> list[dict[str, Any]]:
        """What the reward services are told, `samples` times per prompt, side by side."""
        return [{"prompt": c, "targets": t} for c, t in zip(self.captions, self.targets) for _ in range(samples)]


def heldout_signs(prompts: int, size: tuple[int, int], lengths: tuple[int, int], seed: int) -> Signs:
    """The first `prompts` held-out signs of this seed with captions of their own.

    Raises:
      ValueError: a size or length that cannot be drawn, or fewer different signs than asked for.
    """
    config = RenderedConfig("heldout", (size,), (1.0,), (lengths,), shapes=0, pseudo_words=0, other_faces=0, centred=1)
    found: dict[str, dict[str, Any]] = {}
    for index in range(20 * prompts):
        example = render_example(seed, index, config)
        found.setdefault(example["caption"], example)
        if len(found) == prompts:
            examples = list(found.values())
            images = np.stack([e["image"] for e in examples])
            return Signs(images, tuple(found), tuple(e["targets"] for e in examples))
    raise ValueError(
        f"there are only {len(found)} different held-out signs of {lengths[0]} to {lengths[1]} characters; ask for fewer prompts"
    )


class Drawing:
    """Draws the signs with either policy. Sample r of prompt p always has the same keys, images of a prompt the same noise."""

    def __init__(self, sft: str | Path, rl: str | Path, signs: Signs, seed: int, chunk: int = 128):
        self.model, self.signs, self.seed, self.chunk = XOmni(sft), signs, seed, chunk
        other = XOmni(rl)
        for part in ("siglip_vq", *DECODER_COMPONENTS):
            if self.model.config(part) != other.config(part) or self._note(self.model, part) != self._note(other, part):
                raise EvaluationError(
                    f"{rl}: its {part} is not that of {sft}, so a difference between the two need not come from the policy; "
                    "compare with the model that the run started from"
                )
        if self.model.config("transformer") != other.config("transformer"):
            raise EvaluationError(
                f"{rl}: its transformer has other sizes than that of {sft}; compare with the model that the run started from"
            )
        self._other, self.grid = other, self.model.grid(*signs.images.shape[1:3])
        self.model.check_prompts(signs.captions)

    @staticmethod
    def _note(model: XOmni, part: str) -> Any:
        return model.description["components"][part].get("note")

    @functools.cached_property
    def _params(self) -> dict[str, Any]:
        return {"sft": self.model.params("transformer"), "rl": self._other.params("transformer")}

    def codes(self, policy: str, sampling: SamplingConfig, samples: int) -> np.ndarray:
        """Sampled codes [P, R, Y, X]; the first samples do not depend on how many follow."""
        P = len(self.signs.captions)
        at_once = max(k for k in range(1, samples + 1) if samples % k == 0 and (k == 1 or k * P <= SAMPLER_ROWS))
        keys_P = image_keys(self.seed, P)
        self.model.set_params("transformer", self._params[policy])
        parts = []
        for first in range(0, samples, at_once):
            keys_PR = jax.vmap(lambda key: jax.vmap(lambda r: jax.random.fold_in(key, r))(jnp.arange(first, first + at_once)))(keys_P)
            parts.append(np.asarray(self.model.sample_codes(self.signs.captions, self.grid, keys_PR, sampling)["codes"]))
        return np.concatenate(parts, axis=1)

    def real_codes(self) -> np.ndarray:
        """Codes [P, 1, Y, X] of the real images."""
        return np.concatenate([self._encode(self.signs.images[at]) for at in self._slices(len(self.signs.images))])[:, None]

    def real_images(self) -> Iterator[Chunk]:
        """The real images themselves, in chunks for `measure`."""
        for at in self._slices(len(self.signs.images)):
            yield self.signs.images[at], None, None

    def images(self, codes_PRYX: np.ndarray) -> Iterator[Chunk]:
        """(images, codes, codes of the images) of chunks of rollouts, for `measure`."""
        P, R = codes_PRYX.shape[:2]
        codes = codes_PRYX.reshape(P * R, *codes_PRYX.shape[2:])
        prompts = [c for c in self.signs.captions for _ in range(R)]
        noise_keys = jnp.repeat(image_keys(self.seed, P, NOISE), R, axis=0)
        for at in self._slices(len(codes)):
            part = self._fill(codes[at])
            noise = self.model.noise(self._fill(noise_keys[at]), self.grid)
            images = np.asarray(self.model.decode_images(part, self._fill(prompts[at]), noise))[: at.stop - at.start]
            yield images, codes[at], self._encode(images)

    def _encode(self, images: np.ndarray) -> np.ndarray:
        return np.asarray(self.model.encode_pixels(to_pixels(self._fill(images))))[: len(images)]

    def _slices(self, n: int) -> list[slice]:
        return [slice(start, min(start + self.chunk, n)) for start in range(0, n, self.chunk)]

    def _fill(self, rows: Any) -> Any:
        """Repeats the first row up to the chunk: one static shape, one compilation."""
        index = np.arange(self.chunk)
        index[len(rows) :] = 0
        return [rows[i] for i in index] if isinstance(rows, Sequence) else rows[index]
