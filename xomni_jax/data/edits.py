"""Rendered signs that start from another image: recoloured, with another word, from a segmentation or to one. Endless and seeded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from xomni_jax.core.config import check_known
from xomni_jax.data import words
from xomni_jax.data.rendered import SIGN_GROUNDS, RenderedConfig, RenderedSource, render_sign, sign_prompt

TASKS = ("recolour", "replace", "segment", "from_segmentation")


@dataclass(frozen=True)
class EditsConfig:
    """Distribution of the edits.

    Attributes:
      split: train or heldout, whose words are in no training example
      sizes: (height, width) of the images in pixels, multiples of 8; each is drawn equally often
      text_length: fewest and most characters of a sign
      tasks: which of recolour, replace (the word), segment (letters white on black) and from_segmentation; each is drawn equally often
    """

    split: words.Split = "train"
    sizes: tuple[tuple[int, int], ...] = ((32, 64),)
    text_length: tuple[int, int] = (3, 6)
    tasks: tuple[str, ...] = TASKS

    def __post_init__(self):
        check_known(self, split=words.SPLITS)
        if not self.tasks or set(self.tasks) - set(TASKS):
            raise ValueError(f"tasks={self.tasks}: choose some of {', '.join(TASKS)}")
        self.signs  # noqa: B018 - refuses sizes and lengths that do not fit

    @property
    def signs(self) -> RenderedConfig:
        """The distribution of the signs."""
        n = len(self.sizes)
        return RenderedConfig(self.split, self.sizes, (1.0,) * n, (self.text_length,) * n, shapes=0.0)


class EditsSource:
    """Edits as a source: `images` are the input and the output, `image` the output, `caption` says what is to be done."""

    Options: ClassVar[type] = EditsConfig

    def __init__(self, options: EditsConfig, seed: int, batch_size: int):
        self.options, self.seed = options, seed
        self.signs = RenderedSource(options.signs, seed, batch_size)

    def __len__(self) -> int:
        return len(self.signs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sign, rng = self.signs[index], np.random.default_rng([self.seed, index, 4])
        (text,), ground = sign["targets"]["text"], sign["targets"]["background"]
        task = self.options.tasks[rng.integers(len(self.options.tasks))]
        plain = render_sign(text, ground, sign["size"])[0]
        letters = np.where((plain != plain[0, 0]).any(axis=-1, keepdims=True), np.uint8([255] * 3), np.uint8(0))
        if task == "recolour":
            ground = str(rng.choice([colour for colour in SIGN_GROUNDS if colour != ground]))
            caption, before, after = f"make the sign {ground}", plain, render_sign(text, ground, sign["size"])[0]
        elif task == "replace":
            other = next(t for k in range(1, 50) if (t := self.signs[index + k]["targets"]["text"][0]) != text)
            caption, before, after = f'replace "{text}" by "{other}"', plain, render_sign(other, ground, sign["size"])[0]
            text = other
        elif task == "segment":
            caption, before, after = "segment the letters", plain, letters
        else:
            caption, before, after = sign_prompt(text, ground), letters, plain
        return {
            "id": f"{task}-{sign['id']}",
            "caption": caption,
            "image": after,
            "images": [before, after],
            "roles": ("input", "output"),
            "size": sign["size"],
            "targets": {"text": [text]} | ({} if task == "segment" else {"background": ground}),
        }
