"""Three small suites on the embedded data set, so that the whole path runs with the tiny model: the held-out split, nothing downloaded.

rendered-text    signs, scored like LongText-Bench by an OCR judge
rendered-shapes  shapes, colours and counts, scored by GenEval's rules with contours as the detector
rendered-qa      questions about rendered images, right when the answer is equal but for case
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from PIL import Image

from xomni_jax.data.rendered import NUMBERS, Example, RenderedConfig, render_example
from xomni_jax.evaluation.suite import Item, Record, Suite
from xomni_jax.evaluation.suites import geneval, longtext
from xomni_jax.evaluation.suites.choices import Choices
from xomni_jax.evaluation.suites.sums import right_or_wrong, share_right

ITEMS = 96
SIZE = (32, 64)
_SEED = 2507
_TITLES = {"rendered-text": "Rendered signs", "rendered-shapes": "Rendered shapes", "rendered-qa": "Questions about rendered images"}


def suite(name: str, choices: Choices) -> Suite:
    """rendered-text, rendered-shapes or rendered-qa."""
    make = {"rendered-text": _text_suite, "rendered-shapes": _shapes_suite, "rendered-qa": _qa_suite}[name]
    return dataclasses.replace(make(name, choices), name=name, title=_TITLES[name], size=SIZE, published=ITEMS, files="")


def _text_suite(name: str, choices: Choices) -> Suite:
    return dataclasses.replace(longtext.suite("longtext-en", choices), load=lambda data: _items(0.0, _text_item))


def _shapes_suite(name: str, choices: Choices) -> Suite:
    return dataclasses.replace(geneval.suite("geneval", choices), judge="contours", load=lambda data: _items(1.0, _shapes_item))


def _qa_suite(name: str, choices: Choices) -> Suite:
    aggregate = functools.partial(share_right, name="exact match")
    return Suite(name, "", "answer", lambda data: _items(0.5, _qa_item), _score, aggregate, max_new_tokens=16)


def _items(shapes: float, make: Any) -> list[Item]:
    """The first examples of the held-out split with the given share of shape images."""
    config = RenderedConfig(split="heldout", sizes=(SIZE,), weights=(1.0,), text_lengths=((3, 8),), shapes=shapes, shape_sizes=(SIZE,))
    return [make(f"{n:04d}", render_example(_SEED, n, config), config, n) for n in range(ITEMS)]


def _text_item(id: str, example: Example, config: RenderedConfig, index: int) -> Item:
    text = example["targets"]["text"]
    length = "short" if len(text[0]) <= 5 else "long"
    fields = {"text": text, "language": "en", "category": example["targets"]["background"], "length": length}
    return Item(id, example["caption"], fields)


def _shapes_item(id: str, example: Example, config: RenderedConfig, index: int) -> Item:
    (wanted,) = example["targets"]["shapes"]
    clause = {"class": wanted["shape"], "count": wanted["count"], "color": wanted["colour"]}
    tag = f"{NUMBERS[wanted['count']]} shape" + "s" * (wanted["count"] > 1)
    excluded = [{"class": wanted["shape"], "count": wanted["count"] + 1}]
    metadata = {"tag": tag, "include": [clause], "exclude": excluded, "prompt": example["caption"]}
    return Item(id, example["caption"], {"category": tag, "metadata": metadata})


def _qa_item(id: str, example: Example, config: RenderedConfig, index: int) -> Item:
    # Drawn again when asked for: a suite of images in memory would travel to every process.
    open_image = functools.partial(_image, index, config)
    fields = {"category": f"{example['kind']}: {example['question']}", "answer": example["answer"]}
    return Item(id, example["question"], fields, open_image)


def _image(index: int, config: RenderedConfig) -> Image.Image:
    return Image.fromarray(render_example(_SEED, index, config)["image"])


def _score(item: Item, outputs: Sequence[Any]) -> Record:
    wanted = item.fields["answer"]
    return right_or_wrong(outputs[0].strip().lower() == wanted.lower(), f"wanted {wanted}")
