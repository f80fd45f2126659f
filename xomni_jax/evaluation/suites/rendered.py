"""Three small suites on the embedded data set, so that the whole path runs with the tiny model: the held-out split, nothing downloaded.

rendered-text    signs, scored like LongText-Bench by an OCR judge
rendered-shapes  shapes, colours and counts, scored by GenEval's rules with contours as the detector
rendered-qa      questions about rendered images, right when the answer is equal but for case
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from xomni_jax.data.rendered import NUMBERS, Example, RenderedConfig, render_example
from xomni_jax.evaluation.suite import Item, Record, Suite
from xomni_jax.evaluation.suites.geneval import GenEval
from xomni_jax.evaluation.suites.longtext import LongText
from xomni_jax.evaluation.suites.scoring import right_or_wrong, share_right

ITEMS = 96
SIZE = (32, 64)
_SEED = 2507


class _Rendered(Suite):
    """What the three share: the first examples of the held-out split, of which `shapes` is the share of images of shapes."""

    size = SIZE
    published = ITEMS
    files = ""
    shapes = 0.0

    def load(self, data: Path) -> list[Item]:
        """See Suite; `data` is not read."""
        sizes = {"sizes": (SIZE,), "weights": (1.0,), "text_lengths": ((3, 8),), "shape_sizes": (SIZE,)}
        config = RenderedConfig(split="heldout", shapes=self.shapes, **sizes)
        return [self.item(f"{n:04d}", render_example(_SEED, n, config), config, n) for n in range(ITEMS)]


class RenderedText(_Rendered, LongText):
    """Signs, scored like LongText-Bench."""

    def __init__(self, name: str = "", *how: Any):
        super().__init__(name, *how)
        self.title, self.files = "Rendered signs", ""

    def item(self, id: str, example: Example, config: RenderedConfig, index: int) -> Item:
        """The item of one example."""
        text = example["targets"]["text"]
        length = "short" if len(text[0]) <= 5 else "long"
        fields = {"text": text, "language": "en", "category": example["targets"]["background"], "length": length}
        return Item(id, example["caption"], fields)


class RenderedShapes(_Rendered, GenEval):
    """Shapes, scored by GenEval's rules."""

    title = "Rendered shapes"
    judge = "contours"
    shapes = 1.0

    def item(self, id: str, example: Example, config: RenderedConfig, index: int) -> Item:
        """The item of one example."""
        (wanted,) = example["targets"]["shapes"]
        clause = {"class": wanted["shape"], "count": wanted["count"], "color": wanted["colour"]}
        tag = f"{NUMBERS[wanted['count']]} shape" + "s" * (wanted["count"] > 1)
        excluded = [{"class": wanted["shape"], "count": wanted["count"] + 1}]
        metadata = {"tag": tag, "include": [clause], "exclude": excluded, "prompt": example["caption"]}
        return Item(id, example["caption"], {"category": tag, "metadata": metadata})


class RenderedQA(_Rendered):
    """Questions about signs and shapes."""

    title = "Questions about rendered images"
    task = "answer"
    max_new_tokens = 16
    shapes = 0.5

    def item(self, id: str, example: Example, config: RenderedConfig, index: int) -> Item:
        """The item of one example. Its image is drawn again when asked for: images in memory would travel to every process."""
        open_image = functools.partial(_image, index, config)
        fields = {"category": f"{example['kind']}: {example['question']}", "answer": example["answer"]}
        return Item(id, example["question"], fields, open_image)

    def score(self, item: Item, outputs: Sequence[Any]) -> Record:
        """right: 0 or 1."""
        wanted = item.fields["answer"]
        return right_or_wrong(outputs[0].strip().lower() == wanted.lower(), f"wanted {wanted}")

    def aggregate(self, records: Sequence[Record]) -> dict[str, Any]:
        """Exact match but for case, over all questions and by their kind."""
        return share_right(records, "exact match")


def _image(index: int, config: RenderedConfig) -> Image.Image:
    return Image.fromarray(render_example(_SEED, index, config)["image"])
