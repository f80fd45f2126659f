"""What the dimensions of OneIG-Bench beside text rendering share (OneIG-Bench/OneIG-Benchmark).

Four images per prompt as one 2x2 grid; a tile that is entirely black takes no part, and a prompt without another tile is left out. A
dimension is the mean over prompts of the mean over tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from xomni_jax.evaluation.suite import GridLayout, Item, Record, SuiteError
from xomni_jax.evaluation.suites.downloads import Download
from xomni_jax.evaluation.suites.oneig_text import PROMPTS, REPOSITORY
from xomni_jax.evaluation.suites.reading import PublishedSuite, Row, read_rows, unique_items
from xomni_jax.evaluation.suites.scoring import group_by, mean, unparsed_notes

# The category of the published table -> its folder of images.
FOLDERS = {
    "Anime_Stylization": "anime",
    "Portrait": "human",
    "General_Object": "object",
    "Text_Rendering": "text",
    "Knowledge_Reasoning": "reasoning",
    "Multilingualism": "multilingualism",
}
TILE = {"black": "skip", "format": "JPEG"}
Entry = tuple[str, str, dict[str, Any], str]


class Dimension(PublishedSuite, GridLayout):
    """A dimension in English, or in Chinese where the name ends in -zh. A subclass defines `entries`, `questions` and `tile_scores`.

    Attributes:
      counts: language -> number of published prompts.
      part: folder of the repository with the files of `known`: language -> files, as in Download.
    """

    repeats = 4
    suffix = ".webp"
    judge: str | None = "measure"
    counts: Mapping[str, int] = {}
    part = ""
    known: Mapping[str, Mapping[str, str]] = {"en": {}, "zh": {}}

    def __init__(self, name: str = "", *how: Any):
        self.language = "zh" if name.endswith("-zh") else "en"
        self.published = self.counts[self.language]
        self.title = f"OneIG-Bench {type(self).__name__.lower()} {self.language.upper()}"
        more = (Download(f"{REPOSITORY}, folder {self.part}", self.known[self.language]),) if self.part else ()
        self.downloads, self.folders = ((Download(REPOSITORY, PROMPTS[self.language]), *more),), ("oneig_bench", self.part)
        super().__init__(name, *how)

    def entries(self, data: Path, prompts: Mapping[tuple[str, str], Row]) -> Iterator[Entry]:
        """(folder, id, fields, where) of the prompts of this dimension; `prompts` are those of all, by folder and id."""
        raise NotImplementedError

    def tile_scores(self, item: Item, tiles: Sequence[Sequence[Any]]) -> list[float]:
        """Values whose mean is the score of the prompt, from the replies about the tiles that are not black."""
        raise NotImplementedError

    def load(self, data: Path) -> list[Item]:
        """Items in published order; the id is the folder and the published id, such as anime-000."""
        rows = read_rows(self.find(data, *PROMPTS[self.language]))
        prompts = {(FOLDERS.get(row.text("category"), ""), row.text("id")): row for row in rows}
        return unique_items(((_item(prompts, *entry), entry[3]) for entry in self.entries(data, prompts)), str(data))

    def file(self, item: Item) -> str:
        return item.id.replace("-", "/", 1) + self.suffix

    def score(self, item: Item, outputs: Sequence[Any]) -> Record:
        """score: of the prompt; counted: 0 where it has none."""
        tiles = [replies for replies in outputs if replies[0] is not None]
        values = self.tile_scores(item, tiles)
        value = sum(values) / len(values) if values else 0.0
        black = len(outputs) - len(tiles)
        verdict = f"{value:.3f}" + (f", {black} of {len(outputs)} images are black" if black else "")
        wrong = sum(reply not in ("yes", "no") for tile in tiles for reply in tile) if self.judge == "chat" else 0
        return {"score": value, "counted": int(bool(values)), "verdicts": [verdict] * len(outputs), "unparsed": wrong}

    def aggregate(self, records: Sequence[Record]) -> dict[str, Any]:
        """The mean over prompts, over all and by folder."""
        counted, name = [r for r in records if r["counted"]], type(self).__name__.lower()
        if not counted:
            raise SuiteError(f"{self.title}: no prompt has enough images that are not black; there is nothing to score")
        categories = {key: {"score": mean(rows, "score"), "items": len(rows)} for key, rows in group_by(counted, "category").items()}
        notes = [f"{r['id']} is left out: too many of its images are black." for r in records if not r["counted"]]
        notes += unparsed_notes(records, "no")
        return {"headline": name, "scores": {name: mean(counted, "score")}, "categories": categories, "notes": notes}


def _item(prompts: Mapping[tuple[str, str], Row], folder: str, id: str, fields: Mapping[str, Any], where: str) -> Item:
    if (folder, id) not in prompts:
        raise SuiteError(f"{where}: there is no prompt {id!r} of {folder} in the table of prompts; download the files again")
    return Item(f"{folder}-{id}", prompts[folder, id].text("prompt_en", "prompt_cn"), {"category": folder, **fields})
