"""MMBench (English) and SEED-Bench (images): multiple choice, and two toolkits' rules for which option a reply means.

MMBench: a question is right only when every rotation of its options is answered right. Both toolkits would ask a language model about
replies that their rules cannot decide, and draw a random letter when that fails; here an undecided reply counts as wrong and is listed,
so that the number is reproducible.

SEED-Bench: four options, the first character of the reply decides (lmms-eval), or with `vlmevalkit` VLMEvalKit's rules. Rows of videos
are left out.

The closing request for a letter is worded by us (see suite.INSTRUCTIONS).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from xomni_jax.evaluation.suite import Item, Record, SuiteError
from xomni_jax.evaluation.suites.reading import QuestionTable, Row, find
from xomni_jax.evaluation.suites.scoring import group_by, mean, right_or_wrong, share_right, unparsed_notes

_ROTATIONS = 1_000_000  # rows with equal index modulo this are one question with its options rotated
# Characters that may surround a letter, in the order in which lmms-eval tries them.
_AROUND = ("{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")
_BLANKED = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST_WORDS = 4
# Replies in which a model refuses; VLMEvalKit counts them as the wrong option Z.
_FAILED = "Failed to obtain answer via API"


class MMBench(QuestionTable):
    """mmbench. Every rotation is an item; the field "group" is the index modulo 1,000,000."""

    title = "MMBench EN"
    max_new_tokens = 64
    files = (
        "one of MMBench_DEV_EN*.tsv (VLMEvalKit, github.com/open-compass/MMBench) or en/dev-*.parquet of the Hugging Face dataset "
        "lmms-lab/MMBench"
    )
    folders = ("MMBench", "mmbench")
    patterns = ("MMBench_DEV_EN*.tsv", "en/dev-*.parquet", "dev-*.parquet")
    switches = {"lmms-eval": "the prompt and the extraction of lmms-eval instead of VLMEvalKit's"}
    fallback = "letter"

    def load(self, data: Path) -> list[Item]:
        paths = find(data, self.folders, self.patterns, self.files)
        if paths[0].suffix == ".tsv" and len(paths) > 1:
            raise SuiteError(f"{paths[0].parent} holds {', '.join(p.name for p in paths)}; leave only the version to be measured")
        return super().load(data)

    def item(self, row: Row, image: Callable[[], Any]) -> Item:
        index, options = row.number("index"), {letter: text for letter in "ABCDE" if (text := row.optional(letter))}
        answer = row.optional("answer").strip().upper()
        if len(options) < 2:
            raise SuiteError(f"{row.where}: a question needs two options, it has {len(options)}")
        if answer not in options:
            raise SuiteError(f"{row.where}: the answer {answer!r} is not an option; the answers of test splits are not public, use dev")
        fields = {
            "category": row.optional("category") or "all",
            "l2_category": row.optional("l2-category", "L2-category"),
            "group": index % _ROTATIONS,
            "options": options,
            "answer": answer,
        }
        return Item(str(index), self.prompt(row, options), fields, image)

    def prompt(self, row: Row, options: Mapping[str, str]) -> str:
        """The question as either toolkit lays it out."""
        hint, question, request = row.optional("hint"), row.text("question"), self.instructions["letter"]
        if "lmms-eval" in self.on:
            return f"{hint} {question} There are several options:\n{listed(options)}\n\n{request}".lstrip()
        return (f"Hint: {hint}\n" if hint else "") + f"Question: {question}\nOptions:\n{listed(options)}\n{request}"

    def undecided(self, item: Item, answer: str) -> Mapping[str, Any] | None:
        """Asks which option the answer means; Z stands for none of them."""
        options = item.fields["options"]
        if self.extract(answer, options):
            return None
        wording = self.instructions["match"].format(options=listed(options), answer=answer)
        return {"instruction": wording, "max_tokens": 16, "answers": [*options, "Z"]}

    def extract(self, answer: str, options: Mapping[str, str]) -> str | None:
        """The letter that an answer means by the rules; None where they do not decide."""
        return (lmms_eval if "lmms-eval" in self.on else vlmevalkit)(answer, options)

    def score(self, item: Item, outputs: Sequence[Any]) -> Record:
        """right: this rotation alone; undecided replies are wrong and counted as unparsed."""
        chosen, wanted = self.extract(outputs[0], item.fields["options"]), item.fields["answer"]
        verdict = f"read as {chosen}, wanted {wanted}" if chosen else f"undecided, wanted {wanted}"
        return right_or_wrong(chosen == wanted, verdict, chosen is None)

    def aggregate(self, records: Sequence[Record]) -> dict[str, Any]:
        """Share of groups of which every rotation is right; the same by category and by l2-category."""
        groups = list(group_by(records, lambda r: str(r["fields"]["group"])).values())
        hits = [{"fields": g[0]["fields"], "hit": int(all(r["right"] for r in g))} for g in groups]
        scores = {
            "circular accuracy": mean(hits, "hit"),
            "accuracy of single rotations": mean(records, "right"),
            "undecided": sum(r["unparsed"] for r in records),
        }
        scores |= {f"l2: {name}": mean(h, "hit") for name, h in group_by(hits, "l2_category").items() if name}
        categories = {name: {"score": mean(h, "hit"), "items": len(h)} for name, h in group_by(hits, "category").items()}
        notes = unparsed_notes(records, "wrong")
        return {"headline": "circular accuracy", "scores": scores, "categories": categories, "notes": notes}


class SEEDBench(QuestionTable):
    """seedbench."""

    title = "SEED-Bench image"
    max_new_tokens = 16
    files = "data/test-*.parquet of the Hugging Face dataset lmms-lab/SEED-Bench, or VLMEvalKit's SEEDBench_IMG.tsv"
    folders = ("SEED-Bench", "seedbench")
    patterns = ("data/test-*.parquet", "test-*.parquet", "SEEDBench_IMG.tsv")
    switches = {"vlmevalkit": "VLMEvalKit's extraction of the letter instead of the first character"}

    def item(self, row: Row, image: Callable[[], Any]) -> Item | None:
        """See QuestionTable; None for a video."""
        if row.get("data_type", default="image") != "image":
            return None
        options = {letter: row.text(f"choice_{letter.lower()}", letter) for letter in "ABCD"}
        answer, question = row.text("answer").strip().upper(), row.text("question")
        if answer not in options:
            raise SuiteError(f"{row.where}: the answer {answer!r} is not one of A to D")
        category = row.get("question_type_id", "category", kind=(str, int), default="all")
        fields = {"category": str(category), "options": options, "answer": answer}
        return Item(row.text("question_id", "index"), f"{question}\n{listed(options)}\n{self.instructions['letter']}", fields, image)

    def score(self, item: Item, outputs: Sequence[Any]) -> Record:
        """right: 0 or 1. Only the switch's extraction can be undecided."""
        extracted = "vlmevalkit" in self.on
        chosen = vlmevalkit(outputs[0], item.fields["options"]) if extracted else first_character(outputs[0])
        wanted = item.fields["answer"]
        right = (chosen or "").lower() == wanted.lower()
        return right_or_wrong(right, f"{chosen or 'nothing'!r}, wanted {wanted}", extracted and chosen is None)

    def aggregate(self, records: Sequence[Record]) -> dict[str, Any]:
        """Accuracy, over all questions and by their type."""
        return share_right(records, "accuracy") | {"notes": unparsed_notes(records, "wrong")}


def listed(options: Mapping[str, str]) -> str:
    """The options, one a line."""
    return "\n".join(f"{letter}. {text}" for letter, text in options.items())


def first_character(reply: str) -> str:
    """What lmms-eval takes for the answer; "" of an empty reply."""
    return reply.strip()[:1]


# ---- which option a reply means: the rules of the toolkits before they would ask a language model ----
def lmms_eval(reply: str, options: Mapping[str, str]) -> str | None:
    """The option by lmms-eval's rules; None when undecided. Letters go to E however many options there are.

    A bare A in a reply of more than three words is taken for an article, and then no bare letter counts.
    """
    words, letters = reply.split(), "ABCDE"
    if _FAILED in reply:
        return None
    bare = _present(words, letters)
    if len(bare) == 1 and not ("A" in words and len(words) > 3):
        return bare[0]
    for form in _AROUND:
        found = _present(words, [form.format(letter) for letter in letters])
        if len(found) == 1:
            return found[0].strip(".,:()")
    return _by_text(reply, options)


def vlmevalkit(reply: str, options: Mapping[str, str]) -> str | None:
    """The option by VLMEvalKit's rules; None when undecided.

    The letter must be the only one and among the last four words; an option's text is looked for only in replies no longer than
    twice all options together.
    """
    words = reply.translate(_BLANKED).split()
    found = _present(words, options)
    if len(found) == 1 and words.index(found[0]) >= len(words) - _LAST_WORDS and _FAILED not in reply:
        return found[0]
    if len(reply) > 2 * sum(map(len, options.values())):
        return None
    return _by_text(reply, options)


def _present(words: Collection[str], letters: Collection[str]) -> list[str]:
    return [letter for letter in letters if letter in words]


def _by_text(reply: str, options: Mapping[str, str]) -> str | None:
    found = [letter for letter, text in options.items() if text.lower() in reply.lower()]
    return found[0] if len(found) == 1 else None
