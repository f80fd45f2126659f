"""LongText-Bench (X-Omni, arXiv 2507.22058, section 4.3.1): how much of a long text appears in the image.

Four images per prompt, read by an OCR model (officially Qwen2.5-VL-7B-Instruct, at most 1024 new tokens); recall of words (English,
lower-cased) or characters (Chinese, case kept), as a ratio of sums over all images. Rules: github.com/X-Omni-Team/X-Omni, textbench.
Its cleaning of replies removes `No text recognized.` but, by mistake, not the stray word `addCriterion`; `clean-replies` removes both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xomni_jax.evaluation.suite import Item, Record, SuiteError
from xomni_jax.evaluation.suites.downloads import GITHUB, Download
from xomni_jax.evaluation.suites.reading import PublishedSuite, Row, read_rows, unique_items
from xomni_jax.evaluation.suites.scoring import HALLUCINATION, NO_TEXT, countable, matches, ratio, ratios_by, without_space

_ORIGIN = f"{GITHUB} X-Omni-Team/X-Omni, folder textbench (also the Hugging Face dataset X-Omni/LongText-Bench)"
_FILES = {
    "en": {"text_prompts.jsonl": "203974 sha256:a2130769e72bd8560470a066114cdac87f80f1eb071ba6bc0f7033225a9be0d8"},
    "zh": {"text_prompts_zh.jsonl": "169494 sha256:6512cd121ac093e8113e114d76eb2c0ce967c220b18e2049e1063554ce496758"},
}


class LongText(PublishedSuite):
    """longtext-en or longtext-zh."""

    repeats = 4
    judge = "ocr"
    published = 160
    folders = ("longtext_bench", "textbench")
    switches = {"clean-replies": "remove addCriterion and 'No text recognized' with or without the full stop before counting"}
    language = "en"

    def __init__(self, name: str = "", *how: Any):
        self.language = "zh" if name.endswith("-zh") else "en"
        self.title = f"LongText-Bench {self.language.upper()}"
        self.downloads = ((Download(_ORIGIN, _FILES[self.language]),),)
        super().__init__(name, *how)

    def load(self, data: Path) -> list[Item]:
        """Items of the published jsonl. The id is prompt_id with four digits: a key with gaps, not a row number."""
        return unique_items((_item(row, self.language), row.where) for row in read_rows(self.find(data, *_FILES[self.language])))

    def questions(self, item: Item) -> Sequence[Any]:
        return ({"instruction": self.instructions["ocr"], "max_tokens": 1024},)

    def score(self, item: Item, outputs: Sequence[Any]) -> Record:
        """match and gt: tokens found and wanted, summed over the item's images."""
        language = item.fields["language"]
        wanted = tokens(" ".join(item.fields["text"]), language)
        read = [clean(reply, "clean-replies" in self.on) for (reply,) in outputs]
        found = [matches(wanted, tokens(reply, language)) for reply in read]
        gt = len(wanted) * len(outputs)
        unit = "characters" if language == "zh" else "words"
        return {
            "score": sum(found) / gt,
            "match": sum(found),
            "gt": gt,
            "read": read,
            "verdicts": [f"{n} of {len(wanted)} {unit}" for n in found],
            "unparsed": 0,
        }

    def aggregate(self, records: Sequence[Record]) -> dict[str, Any]:
        """Text accuracy: all matches over all wanted tokens (not a mean of ratios), by category and by length."""
        by_length = ratios_by(records, "length", "match", "gt")
        return {
            "headline": "text accuracy",
            "scores": {"text accuracy": ratio(records, "match", "gt")} | {f"{k} prompts": v["score"] for k, v in by_length.items()},
            "categories": ratios_by(records, "category", "match", "gt"),
        }


def tokens(text: str, language: str) -> list[str]:
    """What is counted: words of English, single characters of Chinese."""
    if language == "zh":
        return list(without_space(countable(text)))
    return countable(text).lower().split()


def clean(reply: str, thorough: bool = False) -> str:
    """The judge's reply without its phrase for "nothing"; `thorough`: also without its stray word."""
    if thorough:
        reply = reply.replace(HALLUCINATION, "")
        return "" if reply.strip().rstrip(".") == NO_TEXT.rstrip(".") else reply.replace(NO_TEXT, "")
    return reply.replace(NO_TEXT, "")


def _item(row: Row, language: str) -> Item:
    text = row.strings("text")
    if not tokens(" ".join(text), language):
        raise SuiteError(f"{row.where}: the ground truth {text!r} holds nothing that is counted")
    fields = {"text": text, "language": language, "category": row.text("category"), "length": row.text("length")}
    return Item(f"{row.number('prompt_id'):04d}", row.text("prompt"), fields)
