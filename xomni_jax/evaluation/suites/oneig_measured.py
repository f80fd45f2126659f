"""OneIG-Bench: reasoning, style and diversity, measured by a scoring service; see `oneig` for what they share.

reasoning   similarity of the image and a reference answer
style       the largest similarity to images of the wanted style, at least 0, as the mean of two encoders
diversity   1 - cosine of the embeddings, over the pairs of a prompt's tiles; a prompt with one tile is left out
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xomni_jax.evaluation.suite import Item
from xomni_jax.evaluation.suites.oneig import FOLDERS, TILE, Dimension, Entry
from xomni_jax.evaluation.suites.reading import Row, read_entries, read_rows

_STYLES = {"style.csv": "3127 sha256:6add59b8a5791b97c3abaec4b193d8a1635ef6377e2b2edbbf7730beaa097761"}


class Reasoning(Dimension):
    """oneig-reasoning-en and oneig-reasoning-zh."""

    official_judge = "LLM2CLIP (OpenAI CLIP L/14-336 with Llama-3-8B), asked for the similarity of image and text"
    counts = {"en": 225, "zh": 225}
    part = "scripts/reasoning"
    known = {
        "en": {"gt_answer.json": "141383 sha256:e46733770fc0b99632e77e54f59316bcc7f170752680dd0c24d43c722bae402b"},
        "zh": {"gt_answer_zh.json": "94881 sha256:faaf0849de1fb62829ed49ec5de7f582562847fb01f390b7a4bb106e48f0c116"},
    }

    def entries(self, data: Path, prompts: Mapping[tuple[str, str], Row]) -> Iterator[Entry]:
        for row in read_entries(*self.find(data, *self.known[self.language])):
            yield "reasoning", row.text("id"), {"answer": row.text("value")}, row.where

    def questions(self, item: Item) -> Sequence[Any]:
        return ({"measure": "similarity", "prompt": item.fields["answer"]} | TILE,)

    def tile_scores(self, item: Item, tiles: Sequence[Sequence[Any]]) -> list[float]:
        return [value for (value,) in tiles]


class Style(Dimension):
    """oneig-style-en and oneig-style-zh. Prompts that name no style are left out."""

    official_judge = "CSD and OneIG-StyleEncoder, with the embeddings of the benchmark's style images"
    counts = {"en": 114, "zh": 114}
    part = "scripts/style"
    known = {"en": _STYLES, "zh": _STYLES}

    def entries(self, data: Path, prompts: Mapping[tuple[str, str], Row]) -> Iterator[Entry]:
        for row in read_rows(self.find(data, *_STYLES)):
            if style := row.optional("class"):
                yield "anime", row.text("id"), {"style": style.lower().replace(" ", "_")}, row.where

    def questions(self, item: Item) -> Sequence[Any]:
        return ({"measure": "style", "prompt": item.fields["style"]} | TILE,)

    def tile_scores(self, item: Item, tiles: Sequence[Sequence[Any]]) -> list[float]:
        return [sum(max(value, 0.0) for value in encoders) / len(encoders) for (encoders,) in tiles]


class Diversity(Dimension):
    """oneig-diversity-en and oneig-diversity-zh: prompts of all dimensions."""

    official_judge = "DreamSim (the ensemble), asked for the embedding of an image"
    counts = {"en": 1120, "zh": 1320}

    def entries(self, data: Path, prompts: Mapping[tuple[str, str], Row]) -> Iterator[Entry]:
        return ((folder, id, {}, row.where) for (folder, id), row in prompts.items() if folder in FOLDERS.values())

    def questions(self, item: Item) -> Sequence[Any]:
        return ({"measure": "embedding", "prompt": ""} | TILE,)

    def tile_scores(self, item: Item, tiles: Sequence[Sequence[Any]]) -> list[float]:
        return [1 - _cosine(a, b) for (a,), (b,) in itertools.combinations(tiles, 2)]


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))
