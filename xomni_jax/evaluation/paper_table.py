"""The commands that make the paper's tables 1 to 4 again, every setting named, with where it comes from and what came out.

The paper (arXiv 2507.22058) prints numbers, and hardly a setting. What it leaves open is set here as the released code does it or as
the benchmark prescribes, and marked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from xomni_jax.evaluation import paper
from xomni_jax.evaluation.eval_run import EvalRun, read_eval_run
from xomni_jax.evaluation.judges import OFFICIAL
from xomni_jax.evaluation.suites import get_suite

PAPER, CODE, BENCHMARK, OPEN = "paper", "released code", "benchmark", "not stated"
MARKS = {PAPER: "", CODE: "*", BENCHMARK: "+", OPEN: "?"}
LEGEND = {
    PAPER: "stated in the paper",
    CODE: "not stated in the paper for its tables; as the released code does by default",
    BENCHMARK: "not stated in the paper; as the benchmark prescribes",
    OPEN: "not stated anywhere; the choice made here",
}
MODELS = {"en": "models/xomni-en", "zh": "models/xomni-zh"}  # converted from the released X-Omni-En and X-Omni-Zh
VLM = "Qwen/Qwen2.5-VL-7B-Instruct"
JUDGES = {"ocr": f"{VLM}@http://127.0.0.1:8000/v1", "vqa": f"{VLM}@http://127.0.0.1:8000/v1", "detector": "http://127.0.0.1:8003"}
DRAWING = {"height": 1152, "width": 1152, "temperature": 1.0, "top-k": 50, "top-p": 1.0, "min-p": 0.03, "guidance": 1.0, "seed": 1234}
FOUR_STATED = ("longtext-en", "longtext-zh")  # the paper says four images per prompt
# What else the paper does not say about a row, beside the settings that are marked.
NOTES = {
    "geneval": "the rewritten prompts, the rewriter and its instruction",
    "pope": "the metric (mean F1 of the splits is taken)",
    "mmbench": "the version and the split (dev is the one with answers)",
    "seedbench": "how a letter is read from the reply",
    "docvqa": "the split (val is the one with answers)",
}


class Setting(NamedTuple):
    """One setting of a row and who says so: PAPER, CODE, BENCHMARK or OPEN."""

    name: str
    value: str
    source: str


class Row(NamedTuple):
    """One number of the paper: how to make it again, what the paper prints, what runs gave ({} without)."""

    table: int
    suite: str
    settings: tuple[Setting, ...]
    command: str
    paper: dict[str, str | None]
    ours: dict[str, str | None]
    run: EvalRun | None


def rows(runs: Iterable[EvalRun] = ()) -> list[Row]:
    """One row per suite, in the order of the paper; of several runs of a suite the one with the most items, then the latest, counts."""
    best: dict[str, EvalRun] = {}
    for run in sorted(runs, key=lambda run: (len(run.items), (run.path / "results.json").stat().st_mtime)):
        best[run.suite] = run
    made = []
    for suite, place in paper.PLACES.items():
        run, settings = best.get(suite), suite_settings(suite)
        ours = {} if run is None else paper.ours(run.results)
        made.append(Row(place.table, suite, settings, command(suite), paper.values(suite)[paper.OURS], ours, run))
    return sorted(made, key=lambda row: row.table)


def suite_settings(name: str) -> tuple[Setting, ...]:
    """Every setting of a suite's run, with its source."""
    suite, language = get_suite(name), language_of(name)
    checkpoint = Setting("checkpoint", f"X-Omni-{language.capitalize()}", OPEN)
    if suite.task == "answer":
        return (
            checkpoint,
            Setting("decoding", "greedy", CODE),
            Setting("max_new_tokens", str(suite.max_new_tokens), BENCHMARK),
            Setting("instruction after the question", "the suite's default", BENCHMARK),
        )
    repeats = Setting("images per prompt", str(suite.repeats), PAPER if name in FOUR_STATED else BENCHMARK)
    rewriting = Setting("rewriting", "yes" if name == "geneval" else "none", PAPER if name == "geneval" else OPEN)
    return (checkpoint, *(Setting(n, str(v), CODE) for n, v in DRAWING.items()), repeats, rewriting, judge_of(name))


def judge_of(name: str) -> Setting:
    """Who judges a suite that draws. DPG-Bench's own judge cannot be had as a service, a general model stands in for it."""
    if name == "geneval":
        return Setting("judge", OFFICIAL["detector"], BENCHMARK)
    if name == "dpg":
        return Setting("judge", f"{VLM} in place of {OFFICIAL['vqa']}", OPEN)
    return Setting("judge", VLM, CODE if name.startswith("longtext") else BENCHMARK)


def language_of(name: str) -> str:
    """Whose checkpoint a suite takes: the Chinese one for Chinese text, the English one for all else."""
    return "zh" if name.endswith("-zh") else "en"


def command(name: str) -> str:
    """The whole command of a suite; data and out are places of the user's own."""
    suite = get_suite(name)
    options: dict[str, Any] = {"model": MODELS[language_of(name)], "data": f"data/{name}"}
    if suite.task == "generate":
        options |= DRAWING
    if name == "geneval":
        options["rewrite"] = f"{VLM}@http://127.0.0.1:8000/v1"
    if suite.judge:
        options["judge"] = JUDGES[suite.judge]
    return f"xomni eval {name} " + " ".join(f"--{n} {v}" for n, v in options.items()) + f" --out runs/{name}"


def find_runs(directory: str | Path) -> list[EvalRun]:
    """The finished runs of the paper's suites in a directory and below. ValueError when there is no such directory."""
    root = Path(directory)
    if not root.is_dir():
        raise ValueError(f"--runs {root} is no directory; give the one that holds the run directories")
    runs = [read_eval_run(path.parent) for path in sorted(root.rglob("results.json")) if (path.parent / "items.jsonl").is_file()]
    return [run for run in runs if run.suite in paper.PLACES]


def departures(row: Row) -> list[str]:
    """In which settings a run is not what the row's command makes; empty when it is."""
    if row.run is None:
        return []
    facts, published = row.run.facts, get_suite(row.suite).published
    said = [f"{len(row.run.items)} of {published} items"] if published and len(row.run.items) != published else []
    facts["rewriting"] = "yes" if facts.get("data.rewritten") else "none"
    for setting in row.settings:
        name = "repeats" if setting.name == "images per prompt" else setting.name.replace("-", "_")
        found = next((facts[at] for at in (name, f"sampling.{name}") if at in facts), None)
        if found is not None and str(found) != setting.value and not same_number(found, setting.value):
            said.append(f"{setting.name} {found}")
    return said + ([f"switches {facts['switches']}"] if facts["switches"] != "none" else [])


def same_number(found: Any, wanted: str) -> bool:
    """1 and 1.0 are the same."""
    try:
        return float(found) == float(wanted)
    except (TypeError, ValueError):
        return False


def table_text(made: list[Row]) -> str:
    """The table for a terminal."""
    lines, number = [], 0
    for row in made:
        if row.table != number:
            number = row.table
            lines += ["" if lines else "", f"Table {number}: {paper.tables()[number]['title']}", ""]
        lines += row_text(row) + [""]
    marks = "\n".join(f"  {mark or ' '} {LEGEND[source]}" for source, mark in MARKS.items())
    return "\n".join(lines[1:]) + f"Marks after a setting:\n{marks}\n"


def row_text(row: Row) -> list[str]:
    """The lines of one suite."""
    settings = ", ".join(f"{s.name} {s.value}{MARKS[s.source]}" for s in row.settings)
    lines = [f"{row.suite}: {get_suite(row.suite).title}", f"  {row.command}", f"  settings: {settings}"]
    unstated = [s.name for s in row.settings if s.source != PAPER]
    lines.append(f"  the paper does not say: {', '.join(filter(None, (*unstated, NOTES.get(row.suite))))}")
    lines.append("  paper: " + numbers(row.paper))
    if row.run is None:
        return [*lines, "  ours:  not run"]
    apart = departures(row)
    model = row.run.facts.get("model.sha256", "images of another program")
    lines.append(f"  ours:  {numbers(row.ours)}   ({row.run.path}, model {str(model)[:12]}, judge {row.run.facts['judge.name']})")
    return [*lines, *([f"  not what the command above makes: {', '.join(apart)}"] if apart else [])]


def numbers(values: Mapping[str, str | None]) -> str:
    """Columns and their values."""
    return ", ".join(f"{column} {value or '-'}" for column, value in values.items())
