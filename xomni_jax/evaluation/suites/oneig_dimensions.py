"""OneIG-Bench: alignment, reasoning, style and diversity; see `oneig` for what they share.

alignment   questions answered yes or no; one counts as no when its parent got no by the parent's own answer (no cascade)
reasoning   similarity of the image and a reference answer
style       the largest similarity to images of the wanted style, at least 0, as the mean of two encoders
diversity   1 - cosine of the embeddings, over the pairs of a prompt's tiles; a prompt with one tile is left out
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xomni_jax.evaluation.suite import Item
from xomni_jax.evaluation.suites.oneig import FOLDERS, TILE, Dimension, Entry
from xomni_jax.evaluation.suites.reading import Row, read_entries, read_rows

_STYLES = {"style.csv": "3127 sha256:6add59b8a5791b97c3abaec4b193d8a1635ef6377e2b2edbbf7730beaa097761"}


class Alignment(Dimension):
    """oneig-alignment-en and oneig-alignment-zh. Officially only the exact reply `Yes` is one; here case and punctuation do not matter."""

    judge = "chat"
    official_judge = "Qwen2.5-VL-7B-Instruct"
    part = "scripts/alignment/Q_D"
    known = {
        "en": {
            "anime.json": "240912 sha256:21ea3d0360e69d72bc5f4cbb93b203d293d16f5c2f626634a52b990119e0a6e3",
            "human.json": "233346 sha256:0e92b25c6bc4091cac05fa0f4269b3b37465a7cd43ca2768f55f56149cdbf13b",
            "object.json": "179650 sha256:350dfdf72c2da143c78a7544d4c554faf6698c1ba4fcd27c7a9cc9199d487e0e",
        },
        "zh": {
            "anime_zh.json": "250389 sha256:171740d2d7158f0da2d907481b5cd97380398e4a45b53f0976ad4d91e01151d4",
            "human_zh.json": "248770 sha256:819f13b1efab67bdfba9ca633a37e009013350d148323f5d65b2a467f1789c64",
            "object_zh.json": "185005 sha256:19f69cfdf17119ff5400919341c930468a0de5ee06b9c91d8f16ba2365f51498",
            "multilingualism_zh.json": "148469 sha256:63614e72dbd86f1e56ed625a55f73d509323d34b68fb27d8fed0f87a49f69db9",
        },
    }

    def entries(self, data: Path, prompts: Mapping[tuple[str, str], Row]) -> Iterator[Entry]:
        for name in self.known[self.language]:
            for row in read_entries(*self.find(data, name)):
                asked, parents = numbered(row, "question", str), numbered(row, "dependency", list)
                if list(asked) != list(range(1, len(asked) + 1)) or not {*parents, *itertools.chain(*parents.values())} <= {0, *asked}:
                    raise row.wrong("question", "is not numbered from 1, or a dependency has no question")
                fields = {"asked": list(asked.values()), "parents": [parents.get(n, []) for n in asked]}
                yield name.removesuffix(".json").removesuffix("_zh"), row.text("id"), fields, row.where

    def questions(self, item: Item) -> Sequence[Any]:
        wording = self.instructions["yes-no"]
        asked = item.fields["asked"]
        return tuple({"instruction": wording.format(question=q), "max_tokens": 128, "answers": ["yes", "no"]} | TILE for q in asked)

    def tile_scores(self, item: Item, tiles: Sequence[Sequence[Any]]) -> list[float]:
        parents = item.fields["parents"]
        right = [[reply == "yes" for reply in tile] for tile in tiles]
        kept = [[yes and all(tile[p - 1] for p in of if p) for yes, of in zip(tile, parents, strict=True)] for tile in right]
        return [sum(tile) / len(tile) for tile in kept]


class Reasoning(Dimension):
    """oneig-reasoning-en and oneig-reasoning-zh."""

    official_judge = "LLM2CLIP (OpenAI CLIP L/14-336 with Llama-3-8B), asked for the similarity of image and text"
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

    def entries(self, data: Path, prompts: Mapping[tuple[str, str], Row]) -> Iterator[Entry]:
        return ((folder, id, {}, row.where) for (folder, id), row in prompts.items() if folder in FOLDERS.values())

    def questions(self, item: Item) -> Sequence[Any]:
        return ({"measure": "embedding", "prompt": ""} | TILE,)

    def tile_scores(self, item: Item, tiles: Sequence[Sequence[Any]]) -> list[float]:
        return [1 - _cosine(a, b) for (a,), (b,) in itertools.combinations(tiles, 2)]


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


def numbered(row: Row, name: str, kind: type) -> dict[int, Any]:
    """{number: value} of a field that holds an object, or its text in JSON."""
    value = row.get(name, kind=(str, dict))
    try:
        found = {int(key): entry for key, entry in (json.loads(value) if isinstance(value, str) else value).items()}
    except (ValueError, AttributeError, RecursionError):
        raise row.wrong(name, "is not an object with numbers as its keys") from None
    for entry in found.values():
        if not isinstance(entry, kind) or (kind is list and not all(type(n) is int and 0 <= n for n in entry)):
            raise row.wrong(name, f"holds {str(entry)[:60]}, not {'a text' if kind is str else 'a list of numbers'}")
    return dict(sorted(found.items()))
