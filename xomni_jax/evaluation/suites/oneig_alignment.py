"""OneIG-Bench: alignment, questions about each image that a chat model answers; see `oneig` for what the dimensions share.

A question counts as no when a parent got no by its own answer: unlike in DPG-Bench the zeros do not cascade. Officially only the exact
reply `Yes` is one; here case and punctuation do not matter.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from xomni_jax.evaluation.suite import Item
from xomni_jax.evaluation.suites.oneig import TILE, Dimension, Entry
from xomni_jax.evaluation.suites.reading import Row, read_entries


class Alignment(Dimension):
    """oneig-alignment-en and oneig-alignment-zh."""

    judge = "chat"
    official_judge = "Qwen2.5-VL-7B-Instruct"
    counts = {"en": 695, "zh": 895}
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
