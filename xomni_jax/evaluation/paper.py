"""Tables 1 to 4 of the paper (arXiv 2507.22058): its values as printed, the commands that reproduce them, and results of finished runs.

The paper states few settings. The others are those of the released code or of the benchmark, and are marked as such. A run's number that
is not comparable (see `objections`) never stands beside the paper's without saying so.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from xomni_jax.core.tables import format_interval
from xomni_jax.evaluation.eval_run import EvalRun, read_eval_run
from xomni_jax.evaluation.judges import OFFICIAL
from xomni_jax.evaluation.suites import get_suite

OURS = "X-Omni"
# Who states a setting, by the mark that follows it in the table.
PAPER, CODE, BENCHMARK, OPEN = "", "*", "+", "?"
LEGEND = {
    PAPER: "stated in the paper",
    CODE: "not stated in the paper for its tables; as the released code does by default",
    BENCHMARK: "not stated in the paper; as the benchmark prescribes",
    OPEN: "not stated anywhere; the choice made here",
}
MODELS = {"en": "models/xomni-en", "zh": "models/xomni-zh"}  # converted from the released X-Omni-En and X-Omni-Zh
VLM = "Qwen/Qwen2.5-VL-7B-Instruct"
JUDGES = {"ocr": f"{VLM}@http://127.0.0.1:8000/v1", "vqa": f"{VLM}@http://127.0.0.1:8000/v1", "detector": "http://127.0.0.1:8003"}
SAMPLING = {"height": 1152, "width": 1152, "temperature": 1.0, "top-k": 50, "top-p": 1.0, "min-p": 0.03, "guidance": 1.0, "seed": 1234}
FOUR_STATED = ("longtext-en", "longtext-zh")  # the paper states four images per prompt
# What the paper leaves open about a row beside the marked settings.
NOTES = {
    "geneval": "the rewritten prompts, the rewriter and its instruction",
    "pope": "the metric (mean F1 of the splits is taken)",
    "mmbench": "the version and the split (dev is the one with answers)",
    "seedbench": "how a letter is read from the reply",
    "docvqa": "the split (val is the one with answers)",
}


@dataclass(frozen=True)
class SuiteColumns:
    """The columns of a table of the paper that hold a suite's numbers.

    Attributes:
      table: 1 to 4.
      headline: the column of the suite's headline number.
      categories: further columns of the table -> the category of our results that belongs there.
    """

    table: int
    headline: str
    categories: Mapping[str, str] = field(default_factory=dict)

    @property
    def all(self) -> tuple[str, ...]:
        """All columns, the headline last as in the paper."""
        return (*self.categories, self.headline)


COLUMNS = {
    "oneig-text-en": SuiteColumns(1, "OneIG EN"),
    "oneig-text-zh": SuiteColumns(1, "OneIG ZH"),
    "longtext-en": SuiteColumns(1, "LongText EN"),
    "longtext-zh": SuiteColumns(1, "LongText ZH"),
    "dpg": SuiteColumns(2, "Overall", {name.capitalize(): name for name in ("global", "entity", "attribute", "relation", "other")}),
    "geneval": SuiteColumns(
        3,
        "Overall",
        {
            "Single": "single_object",
            "Two": "two_object",
            "Counting": "counting",
            "Colours": "colors",
            "Position": "position",
            "Colour attr.": "color_attr",
        },
    ),
    "pope": SuiteColumns(4, "POPE"),
    "gqa": SuiteColumns(4, "GQA"),
    "mmbench": SuiteColumns(4, "MMBench"),
    "seedbench": SuiteColumns(4, "SEED-Img"),
    "docvqa": SuiteColumns(4, "DocVQA"),
    "ocrbench": SuiteColumns(4, "OCRBench"),
}


@functools.cache
def tables() -> dict[int, dict[str, Any]]:
    """Number of the table -> {"title", "note", "columns", "rows": {model: values as printed, None where there is none}}."""
    text = (resources.files("xomni_jax") / "assets" / "paper_tables.json").read_text(encoding="utf-8")
    return {int(number): table for number, table in json.loads(text).items()}


def values(suite: str) -> dict[str, dict[str, str | None]]:
    """Model -> {column: value as printed} over the columns of a suite; models without any are left out. X-Omni is the last."""
    columns = COLUMNS[suite]
    table = tables()[columns.table]
    at = {column: table["columns"].index(column) for column in columns.all}
    rows = {model: {column: row[i] for column, i in at.items()} for model, row in table["rows"].items()}
    return {model: row for model, row in rows.items() if any(row.values())}


def ours(results: Mapping[str, Any]) -> dict[str, str | None]:
    """Column -> value of a run in the paper's scale and digits; None where the run has none."""
    suite = results["suite"]
    columns, scale = COLUMNS[suite], get_suite(suite).paper_scale
    scores = {column: results["categories"].get(name, {}).get("score") for column, name in columns.categories.items()}
    scores[columns.headline] = results["headline"]["value"]
    decimals = len(values(suite)[OURS][columns.headline].partition(".")[2])
    return {column: None if value is None else f"{scale * value:.{decimals}f}" for column, value in scores.items()}


# ---- one run beside the paper ----
def objections(results: Mapping[str, Any]) -> list[str]:
    """Why a run's headline cannot be compared with published numbers, one sentence each; empty when it can."""
    comparable = results.get("comparable")
    if comparable is None:
        return ["the run does not record how it was judged; run the same command again with --phase score"]
    return [] if comparable["yes"] else list(comparable["because"])


def sample(results: Mapping[str, Any]) -> str:
    """How many items a run's numbers are made of."""
    items, published = (results["counts"].get(name) for name in ("items", "published"))
    return f"{items} of {published} items" if published and items != published else f"{items} items"


def category_order(run: EvalRun) -> list[str]:
    """The categories of a run in the order of the paper's columns; others as they first appear in the published data."""
    columns = COLUMNS[run.suite].categories.values() if run.suite in COLUMNS else ()
    appearing = (run.categories[i] for i in run.published_order)
    return [name for name in dict.fromkeys((*columns, *appearing, *run.results["categories"])) if name in run.results["categories"]]


# ---- the table of all suites ----
class StatedSetting(NamedTuple):
    """One setting of a suite and who states it: PAPER, CODE, BENCHMARK or OPEN."""

    name: str
    value: Any
    source: str


def suite_settings(name: str) -> tuple[StatedSetting, ...]:
    """Every setting of a suite's run, with its source."""
    suite, language = get_suite(name), language_of(name)
    checkpoint = StatedSetting("checkpoint", f"X-Omni-{language.capitalize()}", OPEN)
    if suite.task == "answer":
        return (
            checkpoint,
            StatedSetting("decoding", "greedy", CODE),
            StatedSetting("max_new_tokens", suite.max_new_tokens, BENCHMARK),
            StatedSetting("instruction after the question", "the suite's default", BENCHMARK),
        )
    # DPG-Bench's own judge is not available as a service; a general model replaces it.
    other = {"geneval": (OFFICIAL["detector"], BENCHMARK), "dpg": (f"{VLM} in place of {OFFICIAL['vqa']}", OPEN)}
    judge = StatedSetting("judge", *other.get(name, (VLM, CODE if name.startswith("longtext") else BENCHMARK)))
    repeats = StatedSetting("images per prompt", suite.repeats, PAPER if name in FOUR_STATED else BENCHMARK)
    rewriting = StatedSetting("rewriting", "yes" if name == "geneval" else "none", PAPER if name == "geneval" else OPEN)
    return (checkpoint, *(StatedSetting(n, v, CODE) for n, v in SAMPLING.items()), repeats, rewriting, judge)


def language_of(name: str) -> str:
    """Language of the checkpoint that a suite evaluates: Chinese for Chinese text, English otherwise."""
    return "zh" if name.endswith("-zh") else "en"


def command(name: str) -> str:
    """The whole command of a suite; the user adapts the paths of data and output."""
    suite = get_suite(name)
    options: dict[str, Any] = {"model": MODELS[language_of(name)], "data": f"data/{name}"}
    if suite.task == "generate":
        options |= SAMPLING
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
    return [run for run in runs if run.suite in COLUMNS]


def other_settings(run: EvalRun) -> list[str]:
    """The settings in which a run differs from the command of its suite; empty when it does not."""
    settings = run.flat_settings
    settings["rewriting"] = "yes" if settings.get("data.rewritten") else "none"
    differing = []
    for setting in suite_settings(run.suite):
        name = "repeats" if setting.name == "images per prompt" else setting.name.replace("-", "_")
        value = settings.get(name, settings.get(f"sampling.{name}"))
        if value not in (None, setting.value):
            differing.append(f"{setting.name} {value}")
    return differing + ([f"switches {settings['switches']}"] if settings["switches"] != "none" else [])


def best_runs(runs: Iterable[EvalRun]) -> dict[str, EvalRun]:
    """Suite -> the run to show of it: a comparable one before others, then of most items, then the latest."""
    rank = lambda run: (not objections(run.results), len(run.items), (run.path / "results.json").stat().st_mtime)
    return {run.suite: run for run in sorted(runs, key=rank)}


def table_text(runs: Iterable[EvalRun] = ()) -> str:
    """All suites for a terminal, in the order of the paper, each with the best of the finished runs."""
    lines, best, number_of = [], best_runs(runs), lambda suite: COLUMNS[suite].table
    for number, suites in itertools.groupby(sorted(COLUMNS, key=number_of), key=number_of):
        lines += [f"Table {number}: {tables()[number]['title']}", ""]
        for suite in suites:
            lines += [*suite_text(suite), *(run_text(best[suite]) if suite in best else ["  ours:  not run"]), ""]
        lines.append("")
    return "\n".join([*lines, "Marks after a setting:", *(f"  {mark or ' '} {meaning}" for mark, meaning in LEGEND.items()), ""])


def suite_text(suite: str) -> list[str]:
    """How to reproduce the numbers of a suite, and what the paper prints."""
    settings = suite_settings(suite)
    unstated = [s.name for s in settings if s.source != PAPER]
    return [
        f"{suite}: {get_suite(suite).title}",
        f"  {command(suite)}",
        f"  settings: {', '.join(f'{s.name} {s.value}{s.source}' for s in settings)}",
        f"  the paper does not say: {', '.join(filter(None, (*unstated, NOTES.get(suite))))}",
        f"  paper: {numbers(values(suite)[OURS])}",
    ]


def run_text(run: EvalRun) -> list[str]:
    """What a finished run gave, and why that cannot be compared with the paper where it cannot."""
    settings, interval, why, differing = (
        run.flat_settings,
        run.results["headline"].get("interval"),
        objections(run.results),
        other_settings(run),
    )
    model = str(settings.get("model.sha256", "images of another program"))[:12]
    between = f", 95% interval {format_interval(interval, '.4g', get_suite(run.suite).paper_scale)}" if interval else ""
    return [
        f"  ours{', not comparable' * bool(why)}: {numbers(ours(run.results))} from {sample(run.results)}{between}",
        f"    {run.path}, model {model}, judge {settings['judge.name']}",
        *(f"    not comparable: {sentence}" for sentence in why),
        *[f"    not what the command above makes: {', '.join(differing)}"] * bool(differing),
    ]


def numbers(values: Mapping[str, str | None]) -> str:
    """Columns and their values."""
    return ", ".join(f"{column} {value or '-'}" for column, value in values.items())
