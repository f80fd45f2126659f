"""Small suites on the held-out split of the embedded data set, so that the whole path runs with the tiny model and nothing is downloaded.

rendered-text    signs, scored like LongText-Bench by an OCR judge
rendered-shapes  shapes, colours and counts, scored by GenEval's rules with contours as the detector
rendered-qa      questions about rendered images, right when the answer is equal but for case

HeldoutSigns is rendered-text with another choice of signs, judged by the reward services that RL trains on; `evaluation.effect` uses it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from xomni_jax.evaluation.suite import Item, Record, Suite
from xomni_jax.evaluation.suites.geneval import GenEval
from xomni_jax.evaluation.suites.longtext import LongText
from xomni_jax.evaluation.suites.scoring import right_or_wrong, share_right

# The data set imports grain and jax, which are slow to import and not needed for --help: so its functions are imported where they are used.
if TYPE_CHECKING:
    from xomni_jax.data.rendered import Example

ITEMS = 96
SIZE = (32, 64)
_SEED = 2507


class _Rendered(Suite):
    """What the three share: the first examples of the held-out split, of which `shapes` is the share of images of shapes."""

    size = SIZE
    published = ITEMS
    downloads = ()
    shapes = 0.0

    def load(self, data: Path) -> list[Item]:
        """See Suite; `data` is not read."""
        from xomni_jax.data.rendered import RenderedConfig, render_example

        sizes = {"sizes": (SIZE,), "weights": (1.0,), "text_lengths": ((3, 8),), "shape_sizes": (SIZE,)}
        config = RenderedConfig(split="heldout", shapes=self.shapes, **sizes)
        # An image is drawn again when it is asked for, so that none is held in memory.
        image = lambda n: Image.fromarray(render_example(_SEED, n, config)["image"])
        examples = [render_example(_SEED, n, config) for n in range(ITEMS)]
        return [self.item(f"{n:04d}", example, functools.partial(image, n)) for n, example in enumerate(examples)]

    def item(self, id: str, example: Example, image: Callable[[], Image.Image]) -> Item:
        """The item of one example; `image` draws it again."""
        raise NotImplementedError


class RenderedText(_Rendered, LongText):
    """Signs, scored like LongText-Bench."""

    def __init__(self, name: str = "", *how: Any):
        super().__init__(name, *how)
        self.title, self.files = "Rendered signs", ""

    def item(self, id: str, example: Example, image: Callable[[], Image.Image]) -> Item:
        text = example["targets"]["text"]
        length = "short" if len(text[0]) <= 5 else "long"
        fields = {"text": text, "language": "en", "category": example["targets"]["background"], "length": length}
        return Item(id, example["caption"], fields)


class RenderedShapes(_Rendered, GenEval):
    """Shapes, scored by GenEval's rules; one shape too many, of any form, is wrong."""

    title = "Rendered shapes"
    judge = "contours"
    shapes = 1.0

    def item(self, id: str, example: Example, image: Callable[[], Image.Image]) -> Item:
        from xomni_jax.data.glyphs import SHAPES
        from xomni_jax.data.rendered import NUMBERS

        (wanted,) = example["targets"]["shapes"]
        clause = {"class": wanted["shape"], "count": wanted["count"], "color": wanted["colour"]}
        tag = f"{NUMBERS[wanted['count']]} shape" + "s" * (wanted["count"] > 1)
        excluded = [{"class": shape, "count": wanted["count"] + 1 if shape == wanted["shape"] else 1} for shape in SHAPES]
        metadata = {"tag": tag, "include": [clause], "exclude": excluded, "prompt": example["caption"]}
        return Item(id, example["caption"], {"category": tag, "metadata": metadata})


class RenderedQA(_Rendered):
    """Questions about signs and shapes."""

    title = "Questions about rendered images"
    task = "answer"
    max_new_tokens = 16
    shapes = 0.5

    def item(self, id: str, example: Example, image: Callable[[], Image.Image]) -> Item:
        fields = {"category": f"{example['kind']}: {example['question']}", "answer": example["answer"]}
        return Item(id, example["question"], fields, image)

    def score(self, item: Item, outputs: Sequence[Any]) -> Record:
        """right: 0 or 1."""
        wanted = item.fields["answer"]
        return right_or_wrong(outputs[0].strip().lower() == wanted.lower(), f"wanted {wanted}")

    def aggregate(self, records: Sequence[Record]) -> dict[str, Any]:
        """Exact match but for case, over all questions and by their kind."""
        return share_right(records, "exact match")


# ---- signs for studies of reinforcement learning ----
@dataclass(frozen=True)
class Signs:
    """Held-out signs: real images uint8 [P, H, W, 3], captions and targets."""

    images: np.ndarray
    captions: tuple[str, ...]
    targets: tuple[dict[str, Any], ...]


def heldout_signs(prompts: int, size: tuple[int, int], lengths: tuple[int, int], seed: int) -> Signs:
    """The first `prompts` held-out signs of this seed, no two with one caption.

    Raises:
      ValueError: a size or length that cannot be drawn, or fewer different signs than asked for.
    """
    from xomni_jax.data.rendered import RenderedConfig, render_example

    config = RenderedConfig("heldout", (size,), (1.0,), (lengths,), shapes=0, pseudo_words=0, other_faces=0, centred=1)
    found: dict[str, Example] = {}
    for index in range(20 * prompts):
        example = render_example(seed, index, config)
        found.setdefault(example["caption"], example)
        if len(found) == prompts:
            examples = list(found.values())
            return Signs(np.stack([e["image"] for e in examples]), tuple(found), tuple(e["targets"] for e in examples))
    raise ValueError(
        f"there are only {len(found)} different held-out signs of {lengths[0]} to {lengths[1]} characters; ask for fewer prompts"
    )


class HeldoutSigns(Suite):
    """Signs drawn `repeats` times each. Sample r of sign p always has the same keys, and all images of a sign share one decoder noise."""

    title = "Held-out signs"
    judge = "rewards"

    def __init__(self, signs: Signs, repeats: int):
        super().__init__("heldout-signs")
        self.signs, self.repeats, self.size, self.published = signs, repeats, signs.images.shape[1:3], len(signs.captions)

    def load(self, data: Path) -> list[Item]:
        """See Suite; `data` is not read. An item's image is the real sign."""
        rows = zip(self.signs.captions, self.signs.targets, self.signs.images)
        return [
            Item(f"{p:05d}", caption, {"category": targets["background"], "targets": targets}, functools.partial(Image.fromarray, image))
            for p, (caption, targets, image) in enumerate(rows)
        ]

    def keys(self, seed: int, ids: Sequence[str], repeats: int, purpose: int) -> Any:
        import jax

        from xomni_jax.sampling.keys import NOISE, image_keys

        keys_P = image_keys(seed, self.published, purpose)[np.array([int(id) for id in ids])]
        if purpose == NOISE:
            return jax.numpy.repeat(keys_P[:, None], repeats, axis=1)
        return jax.vmap(lambda key: jax.vmap(lambda r: jax.random.fold_in(key, r))(jax.numpy.arange(repeats)))(keys_P)

    def questions(self, item: Item) -> Sequence[Any]:
        """What the reward services are told."""
        return ({"prompt": item.prompt, "targets": item.fields["targets"]},)

    def score(self, item: Item, outputs: Sequence[Any]) -> Record:
        """right: images whose words the OCR service reads exactly, of those that it could score."""
        replies = [reply["ocr"] for (reply,) in outputs]
        right = [float(reply["detail"].get("exact")) for reply in replies if reply["value"] is not None]
        return {
            "score": sum(right) / len(right) if right else None,
            "right": sum(right),
            "scored": len(right),
            "read": [str(reply["detail"].get("text", "")) for reply in replies],
            "verdicts": ["not scored" if r["value"] is None else "right" if r["detail"].get("exact") else "wrong" for r in replies],
            "unparsed": len(replies) - len(right),
        }

    def aggregate(self, records: Sequence[Record]) -> dict[str, Any]:
        """Word accuracy over all images that could be scored."""
        scored = sum(r["scored"] for r in records)
        return {
            "headline": "word accuracy",
            "scores": {"word accuracy": sum(r["right"] for r in records) / scored if scored else None},
            "categories": {},
        }
