"""OneIG-Bench, text rendering (OneIG-Bench/OneIG-Benchmark): edit distance, completion and word accuracy, and their composite.

Four images per prompt as one 2x2 grid; each tile is read by the OCR model (officially Qwen2.5-VL-7B-Instruct, given the tile as a
JPEG). Case matters; whether words or characters are counted is decided for each string. As officially written, a tile that is entirely
black takes no part, and a prompt of black tiles only is scored with the texts read for the prompt before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rapidfuzz.distance import Levenshtein

from xomni_jax.evaluation.suite import GridLayout, Item, Record, SuiteError
from xomni_jax.evaluation.suites.downloads import GITHUB, Download
from xomni_jax.evaluation.suites.reading import PublishedSuite, Row, read_rows, unique_items
from xomni_jax.evaluation.suites.scoring import (
    HALLUCINATION,
    NO_TEXT,
    countable,
    group_by,
    is_chinese,
    matches,
    ratio,
)

REPOSITORY = f"{GITHUB} OneIG-Bench/OneIG-Benchmark (CC BY-NC 4.0)"
PROMPTS = {
    "en": {"OneIG-Bench.csv": "378082 sha256:e06c65b32252d82406fb1a27f13022b38d432c899a2486eb49ab0c100f83b3e1"},
    "zh": {"OneIG-Bench-ZH.csv": "375669 sha256:8fc4ae1403db32dbb1203cc457361c3215500b34e741194a53f5002c9d824700"},
}
_TEXTS = {
    "en": {"text_content.csv": "97314 sha256:ffbf0b588c617b77caf1e9a733496ff5b4704b6534df5fba13201a83f21e0512"},
    "zh": {"text_content_zh.csv": "89199 sha256:6250b3be96e9c4fd4c9cb858dd36b5b2dc4fc8fccb8e4ed0317f5da392db9a1a"},
}
_MAX_DISTANCE = {"en": 100, "zh": 50}  # where the composite stops counting edits
_LONG = 60  # pieces of ground truth above which the judge may write more


class OneIGText(PublishedSuite, GridLayout):
    """oneig-text-en or oneig-text-zh."""

    repeats = 4
    suffix = ".webp"
    judge = "ocr"
    published = 200
    folders = ("oneig_bench", "scripts/text", "oneig_bench/scripts/text")
    switches = {"leave-out-black": "leave out a prompt whose tiles are all black instead of scoring it with its neighbour's texts"}

    def __init__(self, name: str = "", *how: Any):
        self.language = "zh" if name.endswith("-zh") else "en"
        self.title = f"OneIG-Bench text {self.language.upper()}"
        needed = (Download(REPOSITORY, PROMPTS[self.language]), Download(f"{REPOSITORY}, folder scripts/text", _TEXTS[self.language]))
        self.downloads = (needed,)
        super().__init__(name, *how)

    def load(self, data: Path) -> list[Item]:
        """The text rendering prompts in the order of the ground truth file, joined by id. The id stays a string: "000"."""
        (prompts,), (wanted,) = (self.find(data, *names[self.language]) for names in (PROMPTS, _TEXTS))
        by_id = {r.text("id"): r for r in read_rows(prompts) if r.get("category") == "Text_Rendering"}
        return unique_items((_item(row, by_id, prompts), row.where) for row in read_rows(wanted))

    def questions(self, item: Item) -> Sequence[Any]:
        """ "black": the judge returns None for an image that is entirely black."""
        most = max_tokens(item.fields["text_content"])
        return ({"instruction": self.instructions["ocr"], "max_tokens": most, "black": "skip", "format": "JPEG"},)

    def score(self, item: Item, outputs: Sequence[Any]) -> Record:
        """The sums of `measure` over the item's images that are not black, and what was read in them. Score: share of words found."""
        content = item.fields["text_content"]
        replies = [reply for (reply,) in outputs]
        read = [clean(r) for r in replies if r is not None]
        sums = measure(content, read)
        return {
            **sums,
            "score": sums["match"] / sums["gt"] if read else 0.0,
            "black": replies.count(None),
            "read": ["" if r is None else clean(r) for r in replies],
            "counted": read,
            "verdicts": [_verdict(content, r) for r in replies],
            "unparsed": 0,
        }

    def aggregate(self, records: Sequence[Record]) -> dict[str, Any]:
        """ED and CR are means over images, WAC a ratio of sums; the composite joins the three."""
        counted, notes = _without_black_prompts(records, "leave-out-black" in self.on)
        by_class = group_by(counted, "category").items()
        groups = {name: {"score": composite(r, self.language)["text score"], "items": len(r)} for name, r in by_class}
        return {"headline": "text score", "scores": composite(counted, self.language), "categories": groups, "notes": notes}


def max_tokens(text_content: str) -> int:
    """Room for the judge's reply, by the length of the ground truth as it stands in the file."""
    return 256 if len(text_content.split()) > _LONG else 128


def clean(reply: str) -> str:
    """The judge's reply without its stray word and its phrase for "nothing"."""
    return reply.replace(HALLUCINATION, "").replace(NO_TEXT, "")


def normalise(text: str) -> str:
    """What is compared; the brackets, quotes and commas of a list's notation go like any other sign."""
    text = countable(text)
    return ("" if is_chinese(text) else " ").join(text.split())


def measure(text_content: str, replies: Sequence[str]) -> dict[str, int]:
    """Sums over images: edits, exact ones, matched and wanted words (characters where the ground truth is Chinese)."""
    wanted, found = normalise(text_content), [normalise(r) for r in replies]
    split = list if is_chinese(wanted) else str.split
    distances = [Levenshtein.distance(f, wanted) for f in found]
    return {
        "edits": sum(distances),
        "exact": distances.count(0),
        "match": sum(matches(split(wanted), split(f)) for f in found),
        "gt": len(split(wanted)) * len(found),
        "images": len(found),
    }


def composite(records: Sequence[Mapping[str, Any]], language: str) -> dict[str, float]:
    """text score = 1 - min(M, ED) (1 - CR) (1 - WAC) / M with M = 100 (English) or 50 (Chinese)."""
    distance, exact, words = (ratio(records, a, b) for a, b in (("edits", "images"), ("exact", "images"), ("match", "gt")))
    most = _MAX_DISTANCE[language]
    text_score = 1 - min(most, distance) * (1 - exact) * (1 - words) / most
    return {"text score": text_score, "ED": distance, "CR": exact, "WAC": words}


def _without_black_prompts(records: Sequence[Record], leave_out: bool) -> tuple[list[Record], list[str]]:
    """Records that count, and sentences about the others."""
    counted: list[Record] = []
    notes: list[str] = []
    before: Sequence[str] = ()
    for record in records:
        if record["images"]:
            before = record["counted"]
            counted.append(record)
        elif leave_out or not before:
            notes.append(f"All images of {record['id']} are black; it is left out.")
        else:
            notes.append(f"All images of {record['id']} are black; as officially, it is scored with the texts of the prompt before it.")
            counted.append({**record, **measure(record["fields"]["text_content"], before)})
    if not counted:
        raise SuiteError("all images of all prompts are black; there is nothing to score")
    return counted, notes


def _verdict(content: str, reply: str | None) -> str:
    if reply is None:
        return "black image, left out"
    sums = measure(content, [clean(reply)])
    unit = "characters" if is_chinese(normalise(content)) else "words"
    return f"{sums['match']} of {sums['gt']} {unit}, {sums['edits']} edits"


def _item(row: Row, by_id: Mapping[str, Row], prompts: Path) -> Item:
    id = row.text("id")
    if id not in by_id:
        raise SuiteError(f"{row.where}: the id {id!r} is not among the text rendering prompts of {prompts}")
    content, prompt = row.text("text_content"), by_id[id]
    row.strings("text_content", spelled=True)
    if not normalise(content):
        raise SuiteError(f"{row.where}: the ground truth {content!r} holds nothing that is counted")
    return Item(id, prompt.text("prompt_en", "prompt_cn"), {"category": prompt.text("class"), "text_content": content})
