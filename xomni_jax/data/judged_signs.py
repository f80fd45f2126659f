"""Rendered signs that are judged and drawn again: the three tasks that a model learns before Janus-Pro-R1's RL (2506.01480, section 3.1).

draw      caption -> image
verdict   caption, an image that shows it or does not, a question -> yes or no with the reason
redraw    caption, an image that does not, the question and its answer -> an image that does
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from xomni_jax.core.config import Share
from xomni_jax.data import glyphs
from xomni_jax.data.rendered import SIGN_GROUNDS, Example, RenderedConfig, RenderedSource, render_sign
from xomni_jax.data.sources import ENDLESS

QUESTION = "Does the image show what was asked for? Answer yes or no, and say why."


@dataclass(frozen=True)
class JudgedConfig(RenderedConfig):
    """Distribution of the examples, beside that of the signs.

    Attributes:
      question: that a verdict answers, as `config.verdict.question` of stage janus_pro_r1
      judged: share of the examples with an image that is judged; the others are as of the rendered set
      wrong: share of the judged images that do not show what the caption asks for, and are drawn again
      letters: share of the wrong ones whose text is wrong, the colour of the others is
    """

    shapes: float = 0.0
    question: str = QUESTION
    judged: Share = 0.6
    wrong: Share = 0.5
    letters: Share = 0.7

    def __post_init__(self):
        super().__post_init__()
        if self.shapes:
            raise ValueError(f"shapes={self.shapes}: only signs are judged; leave it at 0")


class JudgedSource(RenderedSource):
    """Judged signs as a source: endless; a batch has images of one size, drawn by weight."""

    Options: ClassVar[type] = JudgedConfig

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Example:
        example, cfg, rng = super().__getitem__(index), self.options, np.random.default_rng([self.seed, index, 4])
        return judged(example, cfg, rng) if rng.random() < cfg.judged else example


def judged(example: Example, cfg: JudgedConfig, rng: np.random.Generator) -> Example:
    """A sign with its verdict: `turns` about `images`, of which the judged one is no target."""
    (text,), ground = example["targets"]["text"], example["targets"]["background"]
    images, asked = [example["image"]], (("plain", example["caption"] + "<image 0 context>"), ("user", cfg.question))
    if rng.random() >= cfg.wrong:
        return example | {"images": images, "turns": (*asked, ("assistant", f"Yes, it says {text} on {ground}."))}
    if rng.random() < cfg.letters:
        text = misspelt(text, rng)
    else:
        ground = str(rng.choice([other for other in SIGN_GROUNDS if other != ground]))
    images = [render_sign(text, ground, example["size"])[0], *images]
    return example | {"images": images, "turns": (*asked, ("assistant", f"No, it says {text} on {ground}."), ("plain", "<image 1>"))}


def misspelt(text: str, rng: np.random.Generator) -> str:
    """A text with one or two letters exchanged for others."""
    letters = [n for n, char in enumerate(text) if char != " "]
    for n in rng.choice(letters, min(len(letters), int(rng.integers(1, 3))), replace=False):
        others = [char for char in glyphs.LETTERS if char != text[n]]
        text = text[:n] + str(rng.choice(others)) + text[n + 1 :]
    return text
