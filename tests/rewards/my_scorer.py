"""A scorer of one's own, as xomni_jax/rewards/README.md shows it: how sharp the image is, where the item asks for that."""

from dataclasses import dataclass

import numpy as np

from xomni_jax.rewards import Score, Scorer


class Sharpness(Scorer):
    """Share of the neighbouring pixels that differ clearly in brightness, relative to a wanted share; in [0, 1]."""

    name = "sharpness"
    version = "1"

    @dataclass(frozen=True)
    class Options:
        """What counts as an edge.

        Attributes:
          step: smallest difference in brightness, of 0 to 255.
          wanted: share of edges that scores 1.
        """

        step: int = 30
        wanted: float = 0.1

    def score_image(self, image, item):
        if not item["targets"].get("sharp"):
            return Score(None)  # does not apply to this item
        brightness = image.mean(-1)
        edges = np.abs(np.diff(brightness, axis=1)) > self.options.step
        return Score(min(edges.mean() / self.options.wanted, 1.0), detail={"edges": edges.mean()})
