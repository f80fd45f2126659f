"""MMBench (English): multiple choice, right only when every rotation of the options is answered right.

Rows with equal index modulo 1,000,000 are one question with its options rotated. By default prompt and extraction are VLMEvalKit's, with
`lmms-eval` those of lmms-eval. Both would ask a language model about replies their rules cannot decide, and draw a random letter when
that fails; here an undecided reply counts as wrong, is counted and listed, so that the number is reproducible. The closing request for
a letter is worded by us (see choices.INSTRUCTIONS). The answers of the test split are not public: use dev.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xomni_jax.evaluation.suite import Item, Record, Suite, SuiteError
from xomni_jax.evaluation.suites import letters
from xomni_jax.evaluation.suites.choices import Choices
from xomni_jax.evaluation.suites.reading import Row, check_unique, find
from xomni_jax.evaluation.suites.sums import group_by, mean, right_or_wrong, unparsed_notes
from xomni_jax.evaluation.suites.tables import rows_with_images

FILES = (
    "one of MMBench_DEV_EN*.tsv (VLMEvalKit, github.com/open-compass/MMBench) or en/dev-*.parquet of the Hugging Face dataset "
    "lmms-lab/MMBench"
)
SWITCHES = {"lmms-eval": "the prompt and the extraction of lmms-eval instead of VLMEvalKit's"}
_ROTATIONS = 1_000_000


def suite(name: str, choices: Choices) -> Suite:
    """mmbench."""
    lmms, request = choices.on("lmms-eval"), choices.instruction("letter")
    extract = letters.lmms_eval if lmms else letters.vlmevalkit
    return Suite(
        name=name,
        title="MMBench EN",
        task="answer",
        load=lambda data: load(data, lambda row, options: prompt(row, options, request, lmms)),
        score=lambda item, outputs: score(item, outputs, extract),
        aggregate=aggregate,
        max_new_tokens=64,
        paper_scale=100.0,
        files=FILES,
        switches=SWITCHES,
    )


def load(data: Path, prompt_of: Callable[[Row, Mapping[str, str]], str]) -> list[Item]:
    """Every rotation is an item; its group is the index modulo 1,000,000."""
    patterns = ("MMBench_DEV_EN*.tsv", "en/dev-*.parquet", "dev-*.parquet")
    paths = find(data, ("MMBench", "mmbench"), patterns, FILES)
    if paths[0].suffix == ".tsv" and len(paths) > 1:
        raise SuiteError(f"{paths[0].parent} holds {', '.join(p.name for p in paths)}; leave only the version to be measured")
    return check_unique([(_item(row, image, prompt_of), row.where) for row, image in rows_with_images(paths)])


def prompt(row: Row, options: Mapping[str, str], request: str, lmms: bool) -> str:
    """The question as either toolkit lays it out."""
    hint, question = row.optional("hint"), row.text("question")
    listed = "\n".join(f"{letter}. {text}" for letter, text in options.items())
    if lmms:
        return f"{hint} {question} There are several options:\n{listed}\n\n{request}".lstrip()
    return (f"Hint: {hint}\n" if hint else "") + f"Question: {question}\nOptions:\n{listed}\n{request}"


def options_of(row: Row) -> dict[str, str]:
    """The options that the row has, by letter. SuiteError when there are fewer than two."""
    found = {letter: row.optional(letter) for letter in "ABCDE"}
    options = {letter: text for letter, text in found.items() if text}
    if len(options) < 2:
        raise SuiteError(f"{row.where}: a question needs two options, it has {len(options)}")
    return options


def answer_of(row: Row, options: Mapping[str, str]) -> str:
    """The right letter. SuiteError when the row has none."""
    answer = row.optional("answer").strip().upper()
    if answer not in options:
        raise SuiteError(f"{row.where}: the answer {answer!r} is not an option; the answers of test splits are not public, use dev")
    return answer


def score(item: Item, outputs: Sequence[Any], extract: Callable[[str, Mapping[str, str]], str | None]) -> Record:
    """right: this rotation alone; undecided replies are wrong and counted as unparsed."""
    chosen, wanted = extract(outputs[0], item.fields["options"]), item.fields["answer"]
    verdict = f"read as {chosen}, wanted {wanted}" if chosen else f"undecided, wanted {wanted}"
    return right_or_wrong(chosen == wanted, verdict, chosen is None)


def aggregate(records: Sequence[Record]) -> dict[str, Any]:
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


def _item(row: Row, image: Callable[[], Any], prompt_of: Callable[[Row, Mapping[str, str]], str]) -> Item:
    index, options = row.number("index"), options_of(row)
    fields = {
        "category": row.optional("category") or "all",
        "l2_category": row.optional("l2-category", "L2-category"),
        "group": index % _ROTATIONS,
        "options": options,
        "answer": answer_of(row, options),
    }
    return Item(str(index), prompt_of(row, options), fields, image)
