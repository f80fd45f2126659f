"""WISE (PKU-YuanGroup/WISE): prompts that take knowledge of the world; a chat model grades one image per prompt.

wise           three grades of 0 to 2; WiScore = (0.7 consistency + 0.2 realism + 0.1 aesthetic quality) / 2. What papers report.
wise-verified  the revised prompts, and one grade of 0 or 1.

The overall score weights six categories, which go by the number of the prompt. As officially, an image is left out when its grades
cannot be read; grades over 2, which the official scorer takes, cannot be read either. The instructions are worded by us.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xomni_jax.evaluation.suite import GridLayout, Item, Record, SuiteError
from xomni_jax.evaluation.suites.downloads import GITHUB, Download
from xomni_jax.evaluation.suites.reading import PublishedSuite, Row, read_rows, unique_items
from xomni_jax.evaluation.suites.scoring import ratios_by

_REPOSITORY = f"{GITHUB} PKU-YuanGroup/WISE, folder"
_FILES = {
    "cultural_common_sense.json": "125062 sha256:7a59216c768698280cea37caa574b52f3faf054d73b398b9bb6b3161baf8e3aa",
    "spatio-temporal_reasoning.json": "100831 sha256:e27d797885ad86e64d857d0cc93d33e04be572a8dcae95692a2c7e7876233f9a",
    "natural_science.json": "117085 sha256:b262fae58e413c7a4bd3c3d5a089f8c6529feac227e4b6606be261a949035544",
}
_VERIFIED_FILES = {
    "cultural_common_sense_verified.json": "119062 sha256:23482925266e2784b2ba24b75239fdc6691bf85ae253d2c4aa38b71b45fefa89",
    "spatio-temporal_reasoning_verified.json": "109695 sha256:42c0b9d829365e392c2d4af283850dc76b1f922ab0c79198366de4f306eaf2b6",
    "natural_science_verified.json": "177868 sha256:6f346c336f16f611e5c73e0fcacdccb336c200d534cf111526b22d50ea912555",
}
_CATEGORIES = ("culture", "time", "space", "biology", "physics", "chemistry")
_GRADES = {"consistency": 0.7, "realism": 0.2, "aesthetic quality": 0.1}
_NAMED = re.compile(r"(Consistency|Realism|Aesthetic Quality)\*{0,2}\s*:?\s*(\d)", re.IGNORECASE)
_BARE = re.compile(r"^\s*([0-2])\s*$", re.MULTILINE)
_VERIFIED = re.compile(r"Score\*{0,2}\s*:?\s*([01])\b", re.IGNORECASE)


class WISE(PublishedSuite, GridLayout):
    """wise."""

    title = "WISE"
    judge = "chat"
    official_judge = "GPT-4o-2024-05-13"
    published = 1000
    folders = ("WISE_legacy/data", "data_verified", "wise")
    downloads = ((Download(f"{_REPOSITORY} WISE_legacy/data", _FILES),),)
    instruction, max_tokens = "wise", 2000
    # category -> its last prompt and its weight
    categories = dict(zip(_CATEGORIES, ((400, 0.4), (567, 0.167), (700, 0.133), (800, 0.1), (900, 0.1), (1000, 0.1))))

    def load(self, data: Path) -> list[Item]:
        """Items of the three files; the id is prompt_id."""
        paths = [path for name in self.downloads[0][0].files for path in self.find(data, name)]
        return unique_items((self._item(row), row.where) for row in read_rows(paths))

    def questions(self, item: Item) -> Sequence[Any]:
        wording = self.instructions[self.instruction].format(prompt=item.prompt, explanation=item.fields["explanation"])
        return ({"instruction": wording, "max_tokens": self.max_tokens},)

    def grades(self, reply: str) -> dict[str, int]:
        """The three grades of a reply; none when it cannot be read."""
        found = {name.lower(): int(grade) for name, grade in _NAMED.findall(reply)}
        bare = _BARE.findall(reply)
        if not found and len(bare) >= len(_GRADES):
            found = dict(zip(_GRADES, map(int, bare)))
        return found if len(found) == len(_GRADES) and max(found.values()) <= 2 else {}

    def score(self, item: Item, outputs: Sequence[Any]) -> Record:
        """score: the WiScore, 0 with unparsed where the grades could not be read."""
        grades = self.grades(outputs[0][0]) if isinstance(outputs[0][0], str) else {}
        told = ", ".join(f"{name} {grade}" for name, grade in grades.items()) or "the grades could not be read"
        return {"score": self.wiscore(grades) if grades else 0.0, "verdicts": [told], "one": 1, "unparsed": int(not grades)}

    def wiscore(self, grades: dict[str, int]) -> float:
        """One number of an image's grades."""
        return sum(weight * grades[name] for name, weight in _GRADES.items()) / 2

    def aggregate(self, records: Sequence[Record]) -> dict[str, Any]:
        """The weighted mean of the categories; without some of them, of the others by their weights."""
        graded = [r for r in records if not r["unparsed"]]
        if not graded:
            raise SuiteError(f"{self.title}: the grades of no image could be read; use another judge")
        groups = ratios_by(graded, "category", "score", "one")
        categories = {name: groups[name] for name in self.categories if name in groups}
        weights = {name: self.categories[name][1] for name in categories}
        overall = sum(weight * categories[name]["score"] for name, weight in weights.items())
        notes = [f"{r['id']} is left out: its grades could not be read." for r in records if r["unparsed"]]
        if missing := [name for name in self.categories if name not in categories]:
            overall /= sum(weights.values())
            notes += [f"Without {', '.join(missing)}: the overall score is of the other categories."]
        return {"headline": "WiScore", "scores": {"WiScore": overall}, "categories": categories, "notes": notes}

    def _item(self, row: Row) -> Item:
        number = row.number("prompt_id")
        category = next((name for name, (last, _) in self.categories.items() if 1 <= number <= last), None)
        if category is None:
            raise row.wrong("prompt_id", f"is {number}, not 1 to 1000")
        fields = {"category": category, "subcategory": row.optional("Subcategory"), "explanation": row.text("Explanation")}
        return Item(str(number), row.text("Prompt"), fields)


class WISEVerified(WISE):
    """wise-verified."""

    title = "WISE Verified"
    official_judge = "Qwen3.5-35B-A3B"
    downloads = ((Download(f"{_REPOSITORY} data_verified", _VERIFIED_FILES),),)
    instruction, max_tokens = "wise-verified", 500
    categories = dict(zip(_CATEGORIES, ((400, 0.4), (520, 0.12), (640, 0.12), (760, 0.12), (880, 0.12), (1000, 0.12))))

    def grades(self, reply: str) -> dict[str, int]:
        named, bare = _VERIFIED.search(reply), [grade for grade in _BARE.findall(reply) if grade != "2"]
        return {"score": int(named[1])} if named else {"score": int(bare[0])} if len(bare) == 1 else {}

    def wiscore(self, grades: dict[str, int]) -> float:
        return float(grades["score"])
