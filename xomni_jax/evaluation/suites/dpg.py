"""DPG-Bench (TencentQQGYLab/ELLA): questions about dense prompts, answered yes or no for each of four tiles.

A tile's score is the share of its questions answered `yes`, where a question whose parent has no `yes` is set to 0; the zeros cascade
in the order of the file. 100 x the mean over prompts is the score.

As officially written, each with a switch that corrects it: the reader skips the first data row, and its item is dropped when another
question has the skipped one as a parent (published numbers average 1064 prompts); and category values come from the last tile alone and
from before dependencies are applied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xomni_jax.evaluation.suite import GridLayout, Item, Record, SuiteError
from xomni_jax.evaluation.suites.downloads import GITHUB, Download
from xomni_jax.evaluation.suites.reading import PublishedSuite, Row, read_rows, unique_items
from xomni_jax.evaluation.suites.scoring import unparsed_notes

_ORIGIN = f"{GITHUB} TencentQQGYLab/ELLA, folder dpg_bench"
_QUESTIONS = {"dpg_bench.csv": "git:98457fc9901943f51ff9a30367250fc292533bed"}
Questions = list[dict[str, Any]]


@dataclass(frozen=True)
class QuestionedItem(Item):
    """A prompt and the questions about its images, None without dpg_bench.csv. Not in `fields`: a run drawn without them can be scored."""

    asked: Questions | None = None


class DPG(PublishedSuite, GridLayout):
    """dpg."""

    title = "DPG-Bench"
    repeats = 4
    judge = "vqa"
    published = 1065
    folders = ("dpg_bench",)
    downloads = ((Download(_ORIGIN, {"prompts/*.txt": ""}, "1065 text files"), Download(_ORIGIN, _QUESTIONS, "not needed to draw")),)
    switches = {
        "keep-first-row": "read the first row of dpg_bench.csv, which the official reader skips",
        "all-tiles": "category values over all four tiles, not only the last one",
    }

    def load(self, data: Path) -> list[Item]:
        """Prompts, with their questions when dpg_bench.csv is there."""
        prompts = self._prompts(data)
        try:
            (table,) = self.find(data, "dpg_bench.csv")
        except SuiteError:
            asked = None
        else:
            asked = read_questions(table, "keep-first-row" in self.on)
        # The category to look at images by is where the prompt comes from: the letters its id begins with.
        fields = lambda id: {"category": id.rstrip("0123456789") or "other"}
        made = ((QuestionedItem(id, prompt, fields(id), asked=asked and asked.get(id)), where) for id, prompt, where in prompts)
        items = unique_items(made)
        missing = [item.id for item in items if asked and item.id not in asked]
        if missing:
            raise SuiteError(f"{table} has no questions for {len(missing)} prompts, the first is {missing[0]!r}; download it again")
        return items

    def questions(self, item: Item) -> Sequence[Any]:
        """One request per question of the item. Raises SuiteError when dpg_bench.csv was not there."""
        wording = self.instructions["yes-no"]
        return tuple(
            {"instruction": wording.format(question=q["question"]), "question": q["question"], "max_tokens": 8, "answers": ["yes", "no"]}
            for q in _asked(item)
        )

    def score(self, item: Item, outputs: Sequence[Any]) -> Record:
        """yes: right answers after dependencies over all tiles, asked: their number; by category the two variants of [right, asked]."""
        asked = _asked(item)
        read = [q for q in asked if not q["skipped"]]
        tiles = [dict(zip((q["proposition"] for q in asked), (reply == "yes" for reply in replies), strict=True)) for replies in outputs]
        dropped = not read or any(_after_dependencies(read, tile)[1] for tile in tiles)
        # A dropped item still gets a score of its own.
        counted = [_after_dependencies(asked if dropped else read, tile)[0] for tile in tiles]
        wrong = ["; ".join(q["question"] for q in asked if not c.get(q["proposition"], True)) for c in counted]
        yes, number = sum(sum(c.values()) for c in counted), sum(len(c) for c in counted)
        return {
            "score": yes / number,
            "yes": yes,
            "asked": number,
            "dropped": int(dropped),
            "last_tile": _by_category(read, tiles[-1:]),
            "all_tiles": _by_category(read, tiles),
            "verdicts": [f"{sum(c.values())} of {len(c)}" + (f"; not: {w}" if w else "") for c, w in zip(counted, wrong)],
            "unparsed": sum(reply not in ("yes", "no") for replies in outputs for reply in replies),
        }

    def aggregate(self, records: Sequence[Record]) -> dict[str, Any]:
        """The score, and values of the broad (L1) and fine (L2) categories, times 100."""
        counted = [r for r in records if not r["dropped"]]
        if not counted:
            raise SuiteError("DPG-Bench: no prompt is left, the official reader drops the first one; use the switch keep-first-row")
        all_tiles = "all-tiles" in self.on
        variants = ("all_tiles", "last_tile") if all_tiles else ("last_tile", "all_tiles")
        (broad, fine), (other, _) = (_categories(counted, variant) for variant in variants)
        named = "last tile" if all_tiles else "all tiles"
        scores = {"score": 100 * sum(r["yes"] / r["asked"] for r in counted) / len(counted)}
        scores |= {name: value["score"] for name, value in fine.items()}
        scores |= {f"{name} ({named})": value["score"] for name, value in other.items()}
        notes = [f"{r['id']} is left out, as by the official reader, which skips its first question." for r in records if r["dropped"]]
        notes += unparsed_notes(records, "no")
        return {"headline": "score", "scores": scores, "categories": broad, "notes": notes}

    def _prompts(self, data: Path) -> list[tuple[str, str, str]]:
        """(id, prompt, where) from the published text files or from one jsonl with item_id and prompt."""
        paths = self.find(data, "prompts/*.txt", "prompts.jsonl")
        if paths[0].suffix == ".jsonl":
            return [(row.text("item_id"), row.text("prompt"), row.where) for row in read_rows(paths[0])]
        return [(path.stem, "\n".join(row.text("text") for row in read_rows(path)), str(path)) for path in paths]


def read_questions(table: Path, keep_first_row: bool = False) -> dict[str, Questions]:
    """{item: its questions in the order of the file}; the first row's is marked "skipped" unless kept.

    As officially, a proposition given twice is the later one, and an item that comes again further down starts anew.
    """
    asked: dict[str, dict[int, dict[str, Any]]] = {}
    before = None
    for number, row in enumerate(read_rows(table)):
        id, proposition = row.text("item_id"), row.number("proposition_id")
        if id != before:
            asked[id] = {}
        asked[id][proposition] = {
            "proposition": proposition,
            "parents": _parents(row),
            "category": row.text("tuple").split("(")[0].strip(),
            "question": row.text("question_natural_language"),
            "skipped": number == 0 and not keep_first_row,
        }
        before = id
    return {id: list(of_item.values()) for id, of_item in asked.items()}


def _after_dependencies(asked: Questions, answers: Mapping[int, bool]) -> tuple[dict[int, bool], bool]:
    """Answers after dependencies, and whether a question depends on one that was not read, where the official scorer fails."""
    found = {q["proposition"]: answers[q["proposition"]] for q in asked}
    failed = False
    for q in asked:
        for parent in filter(None, q["parents"]):
            failed |= parent not in found
            if not found.get(parent, True):
                found[q["proposition"]] = False
                break
    return found, failed


def _by_category(asked: Questions, tiles: Sequence[Mapping[int, bool]]) -> dict[str, list[int]]:
    """{category: [right, asked]} of answers before dependencies."""
    found: dict[str, list[int]] = {}
    for q in asked:
        sums = found.setdefault(q["category"], [0, 0])
        sums[0] += sum(tile[q["proposition"]] for tile in tiles)
        sums[1] += len(tiles)
    return found


def _categories(records: Sequence[Record], variant: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """L1 and L2 values, times 100; "items" are answers."""
    sums: dict[str, dict[str, list[int]]] = {"L1": {}, "L2": {}}
    for record in records:
        for name, (right, asked) in record[variant].items():
            for level, key in (("L1", name.split("-")[0].strip()), ("L2", name)):
                entry = sums[level].setdefault(key, [0, 0])
                entry[0], entry[1] = entry[0] + right, entry[1] + asked
    broad, fine = ({k: {"score": 100 * a / n, "items": n} for k, (a, n) in sorted(s.items())} for s in sums.values())
    return broad, fine


def _asked(item: Item) -> Questions:
    if not isinstance(item, QuestionedItem) or item.asked is None:
        raise SuiteError(f"scoring DPG-Bench needs dpg_bench.csv in the data directory; get it from the {_ORIGIN}")
    return item.asked


def _parents(row: Row) -> list[int]:
    text = str(row.get("dependency", kind=(str, int)))
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise row.wrong("dependency", f"is {text!r}, not proposition numbers with commas") from None
