"""MMMU (MMMU-Benchmark/MMMU), validation split: college questions of 30 subjects, multiple choice and short answers, read as officially.

The model sees a question's first image alone, as in the official script for LLaVA. A reply from which no option can be read is wrong and
listed; that script draws a random letter for it. The requests at the end of a question are worded by us.
"""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Sequence
from typing import Any

from xomni_jax.evaluation.suite import Item, Record
from xomni_jax.evaluation.suites import letters
from xomni_jax.evaluation.suites.downloads import HUGGING_FACE, Download
from xomni_jax.evaluation.suites.images import ParquetImage
from xomni_jax.evaluation.suites.reading import PublishedSuite, Row, read_rows, unique_items
from xomni_jax.evaluation.suites.scoring import ratios_by, right_or_wrong, share_right, unparsed_notes

DISCIPLINES = {
    "Art and Design": "Art, Art_Theory, Design, Music",
    "Business": "Accounting, Economics, Finance, Manage, Marketing",
    "Science": "Biology, Chemistry, Geography, Math, Physics",
    "Health and Medicine": "Basic_Medical_Science, Clinical_Medicine, Diagnostics_and_Laboratory_Medicine, Pharmacy, Public_Health",
    "Humanities and Social Science": "History, Literature, Sociology, Psychology",
    "Tech and Engineering": "Agriculture, Architecture_and_Engineering, Computer_Science, Electronics, Energy_and_Power, Materials, "
    "Mechanical_Engineering",
}
_SUBJECTS = {subject: discipline for discipline, subjects in DISCIPLINES.items() for subject in subjects.split(", ")}
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (  # with commas, in scientific notation, plain
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


class MMMU(PublishedSuite):
    """mmmu."""

    title = "MMMU"
    task = "answer"
    max_new_tokens = 128
    published = 900
    paper_scale = 100.0
    folders = ("MMMU", "mmmu")
    downloads = ((Download(f"{HUGGING_FACE} MMMU/MMMU", {"*/validation-*.parquet": ""}, "a folder for each of the 30 subjects"),),)

    def load(self, data: Any) -> list[Item]:
        """Items of the subjects whose files are there; the id is the published one, such as validation_Art_1."""
        return unique_items((self._item(row), row.where) for row in read_rows(self.find(data, "*/validation-*.parquet")))

    def score(self, item: Item, outputs: Sequence[Any]) -> Record:
        """right: 0 or 1; a letter that cannot be read is wrong and counted as unparsed."""
        answers, options = item.fields["answers"], item.fields["options"]
        wanted, chosen = f"wanted {' or '.join(answers)}", letters.mmmu(outputs[0], options) if options else None
        if not options:
            return right_or_wrong(is_right(answers, outputs[0]), wanted)
        return right_or_wrong(chosen in answers, f"read as {chosen or 'nothing'}, {wanted}", chosen is None)

    def aggregate(self, records: Sequence[Record]) -> dict[str, Any]:
        """Accuracy over all questions, by subject, and by discipline among the scores."""
        found = share_right(records, "accuracy")
        found["scores"] |= {name: group["score"] for name, group in ratios_by(records, "discipline", "right", "one").items()}
        return found | {"notes": unparsed_notes(records, "wrong")}

    def _item(self, row: Row) -> Item:
        id, image = row.text("id"), row.values.get("image_1")
        subject = id.removeprefix("validation_").rpartition("_")[0]
        if subject not in _SUBJECTS:
            raise row.wrong("id", f"is {id!r}, which names none of the 30 subjects; take the validation split")
        if not isinstance(image, ParquetImage):
            raise row.wrong("image_1", "is no image")
        given, question, kind, options = row.text("answer"), row.text("question"), row.text("question_type"), {}
        if kind == "multiple-choice":
            options = dict(zip(string.ascii_uppercase, row.strings("options", spelled=True)))
            if given not in options:
                raise row.wrong("answer", f"is {given!r}, which is none of {', '.join(options)}")
        elif kind not in ("open", "short-answer"):
            raise row.wrong("question_type", f"is {kind!r}, not multiple-choice or open")
        shown = "".join(f"({letter}) {text}\n" for letter, text in options.items())
        letter, word = self.instructions["letter"], self.instructions["word"].format(question=question)
        answers = row.strings("answer", spelled=given.startswith("["))
        fields = {"category": subject, "discipline": _SUBJECTS[subject], "options": options, "answers": answers}
        return Item(id, f"{question}\n{shown}\n{letter}" if options else word, fields, image)


def is_right(answers: Sequence[str], reply: str) -> bool:
    """Whether a key phrase of the reply, or a number in one, is an answer: texts by being contained, numbers by two decimals."""
    phrases = _key_phrases(reply)
    numbers = [number for phrase in phrases for form in _NUMBERS for number in re.findall(form, phrase)]
    found = {value for text in [*phrases, *numbers] for value in _normalised(text)}
    wanted = [value for answer in answers for value in _normalised(answer)]
    texts = [w for w in wanted if isinstance(w, str)]
    return any(value in wanted if isinstance(value, float) else any(text in value for text in texts) for value in found)


def _key_phrases(reply: str) -> list[str]:
    """For each line the shortest text after a word that announces the answer, in the last also after "="; else the whole reply."""
    reply = reply.strip().strip(".").lower()
    (*others, last), phrases = reply.split("\n"), []
    for line, keys in [*((line, _KEYS) for line in others), (last, (*_KEYS, "="))]:
        tails = [line.split(key)[-1].strip() for key in keys if key in line]
        # An empty tail gives way to the next one, as officially.
        shortest = functools.reduce(lambda a, b: b if not a or len(b) < len(a) else a, tails, "")
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            phrases.append(shortest)
    return phrases or [reply]


def _normalised(text: str) -> list[str | float]:
    """A number with two decimals, or the text in lower case; a single letter with a space on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
