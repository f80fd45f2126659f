"""MMBench (English and Chinese) and SEED-Bench (images): multiple choice, read by the rules of `letters`.

MMBench: a question is right only when every rotation of its options is answered right. An undecided reply counts as wrong and is listed.

SEED-Bench: four options, the first character of the reply decides (lmms-eval), or with `vlmevalkit` VLMEvalKit's rules. Rows of videos
are left out.

The closing request for a letter is worded by us (see suite.INSTRUCTIONS).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xomni_jax.evaluation.suite import Item, Record, SuiteError
from xomni_jax.evaluation.suites.downloads import HUGGING_FACE, VLMEVALKIT, Download
from xomni_jax.evaluation.suites.letters import first_character, listed, lmms_eval, vlmevalkit
from xomni_jax.evaluation.suites.reading import QuestionTable, Row
from xomni_jax.evaluation.suites.scoring import group_by, mean, right_or_wrong, share_right, unparsed_notes

_LMMS = f"{HUGGING_FACE} lmms-lab/MMBench"
_ROTATIONS = 1_000_000  # rows with equal index modulo this are one question with its options rotated


class MMBench(QuestionTable):
    """mmbench. Every rotation is an item; the field "group" is the index modulo 1,000,000."""

    title = "MMBench EN"
    max_new_tokens = 64
    downloads = (
        (Download(VLMEVALKIT, {"MMBench_DEV_EN.tsv": "md5:b6caf1133a01c6bb705cf753bb527ed8"}, "version 1.0"),),
        (Download(VLMEVALKIT, {"MMBench_DEV_EN_V11.tsv": "md5:30c05be8f2f347a50be25aa067248184"}, "version 1.1"),),
        (Download(_LMMS, {"en/dev-*.parquet": ""}),),
    )
    folders = ("MMBench", "mmbench")
    patterns = ("MMBench_DEV_EN*.tsv", "en/dev-*.parquet", "dev-*.parquet")
    switches = {"lmms-eval": "the prompt and the extraction of lmms-eval instead of VLMEvalKit's"}
    fallback = "letter"

    def load(self, data: Path) -> list[Item]:
        paths = self.find(data, *self.patterns)
        if paths[0].suffix == ".tsv" and len(paths) > 1:
            raise SuiteError(f"{paths[0].parent} holds {', '.join(p.name for p in paths)}; leave only the version to be measured")
        return super().load(data)

    def item(self, row: Row, image: Callable[[], Any]) -> Item:
        index, options = row.number("index"), {letter: text for letter in "ABCDE" if (text := row.optional(letter))}
        answer = row.optional("answer").strip().upper()
        if len(options) < 2:
            raise SuiteError(f"{row.where}: a question needs two options, it has {len(options)}")
        if answer not in options:
            raise row.wrong("answer", f"is {answer!r}, which is no option; the answers of test splits are not public, use dev")
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


class MMBenchCN(MMBench):
    """mmbench-cn: the same questions in Chinese."""

    title = "MMBench CN"
    downloads = (
        (Download(VLMEVALKIT, {"MMBench_DEV_CN.tsv": "md5:08b8fc3324a5ed74155350f57be69fbd"}, "version 1.0"),),
        (Download(VLMEVALKIT, {"MMBench_DEV_CN_V11.tsv": "md5:593f9b5f6bea453d870a798b34ae4f37"}, "version 1.1"),),
        (Download(_LMMS, {"cn/dev-*.parquet": ""}),),
    )
    patterns = ("MMBench_DEV_CN*.tsv", "cn/dev-*.parquet", "dev-*.parquet")
    switches = {}  # lmms-eval asks in Chinese


class SEEDBench(QuestionTable):
    """seedbench."""

    title = "SEED-Bench image"
    max_new_tokens = 16
    downloads = (
        (Download(f"{HUGGING_FACE} lmms-lab/SEED-Bench", {"data/test-*.parquet": ""}),),
        (Download(VLMEVALKIT, {"SEEDBench_IMG.tsv": "md5:68017231464752261a2526d6ca3a10c0"}),),
    )
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
            raise row.wrong("answer", f"is {answer!r}, not one of A to D")
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
