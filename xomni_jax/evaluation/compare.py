"""Two or more runs of one suite, item by item: paired differences with bootstrap intervals, overall and per category."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xomni_jax.checkpoint.store import write_json
from xomni_jax.core.folders import write_text
from xomni_jax.core.tables import TableCell, aligned, csv_text, format_estimate, format_number
from xomni_jax.evaluation import paper
from xomni_jax.evaluation.eval_run import EvalRun, read_eval_run, same_items
from xomni_jax.evaluation.item_cards import embed, image_order, item_card, left_out
from xomni_jax.evaluation.pages import write_page
from xomni_jax.evaluation.statistics import bootstrap_mean, paired_difference, with_bounds
from xomni_jax.evaluation.suite import SuiteError

SHOWN = 24  # items of the page, those that changed most
OVERALL = "all items"
ORDERS = ("largest change first", "most lost first", "most gained first")
METHOD = (
    "Differences are means over items of a run's score minus the first run's, with a 95% bootstrap over the items that have "
    "a score in both. The headline is the suite's own number: it may weigh items otherwise (a ratio of sums, or a mean of task means)."
)


def read_runs(directories: Sequence[str | Path]) -> list[EvalRun]:
    """The runs, sorted as given. SuiteError when they cannot be paired, or with fewer than two."""
    if len(directories) < 2:
        raise SuiteError("a comparison needs at least two runs; give the directories of two: xomni compare RUN1 RUN2")
    runs = [read_eval_run(directory) for directory in directories]
    same_items(runs)
    return runs


def labels(runs: Sequence[EvalRun]) -> list[str]:
    """A short name per run: its folder, or its path where folders are called alike."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def compare(runs: Sequence[EvalRun], seed: int = 0) -> dict[str, Any]:
    """All numbers as JSON-able values; the first run is what the others are compared with.

    "rows" holds one entry per category and one over all items: {"name", "items", "means": per run, "differences": per run after the
    first {"value", "ci95", "items"}}; "items" one entry per item: {"id", "category", "scores": per run}.
    """
    names, base = labels(runs), runs[0]
    categories = np.array(base.categories)
    groups = {OVERALL: np.ones(len(base.items), bool)}
    appearing = dict.fromkeys((*paper.category_order(base), *(base.categories[i] for i in base.published_order)))
    groups |= {name: at for name in appearing if name and (at := categories == name).any()}
    return {
        "suite": base.suite,
        "title": base.results["title"],
        "runs": [
            {"name": name, "path": str(run.path), "headline": run.results["headline"], "not_comparable": paper.objections(run.results)}
            for name, run in zip(names, runs)
        ],
        "settings": different_settings(runs),
        "rows": [row(name, [run.scores[at] for run in runs], seed) for name, at in groups.items()],
        "items": [
            {"id": items[0]["id"], "category": category, "scores": [item.get("score") for item in items]}
            for category, items in zip(base.categories, zip(*(run.items for run in runs)))
        ],
        "method": METHOD,
        "seed": seed,
    }


def row(name: str, scores: Sequence[np.ndarray], seed: int) -> dict[str, Any]:
    """Means and paired differences of one group of items."""
    differences = [paired_difference(other, scores[0], seed) for other in scores[1:]]
    return {
        "name": name,
        "items": len(scores[0]),
        "means": [with_bounds(bootstrap_mean(s, seed))["value"] for s in scores],
        "differences": [with_bounds(d) | {"items": d.prompts} for d in differences],
    }


def different_settings(runs: Sequence[EvalRun]) -> dict[str, list[Any]]:
    """Settings, judge included, that are not the same in all runs: name -> value per run."""
    every = [run.flat_settings for run in runs]
    names = dict.fromkeys(name for settings in every for name in settings)
    return {n: [s.get(n) for s in every] for n in names if len({repr(s.get(n)) for s in every}) > 1}


def most_changed(comparison: dict[str, Any], count: int = SHOWN) -> list[int]:
    """Numbers of the items whose score differs most between any run and the first, largest first; unchanged ones are left out."""
    sizes = [abs(change(item["scores"])) for item in comparison["items"]]
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    return [i for i in order if sizes[i] > 0][:count]


def change(scores: Sequence[float | None]) -> float:
    """The largest difference to the first score, with its sign; 0 where there is none to take."""
    found = [s - scores[0] for s in scores[1:] if s is not None and scores[0] is not None]
    return max(found, key=abs, default=0.0)


# ---- for readers ----
def table_text(comparison: dict[str, Any]) -> str:
    """The comparison for a terminal."""
    lines = [f"{comparison['title']}: {len(comparison['items'])} items"]
    lines += [f"  {name}: {value} ({note})" for name, value, note in headlines(comparison)]
    lines += [f"  {name}: " + " | ".join(map(str, values)) for name, values in comparison["settings"].items()]
    lines += [f"  {name}: not comparable with published numbers: {why}" for name, why in objections(comparison)]
    return "\n".join([*lines, "", "Mean scores of items, and differences with 95% intervals:", aligned(difference_table(comparison)), ""])


def item_rows(comparison: dict[str, Any]) -> Iterator[list[Any]]:
    """Rows of the CSV, one per item: the score in every run, and each run's difference to the first."""
    names = [run["name"] for run in comparison["runs"]]
    yield ["id", "category", *names, *(f"{name} minus {names[0]}" for name in names[1:])]
    for item in comparison["items"]:
        first, *others = item["scores"]
        yield [item["id"], item["category"], first, *others, *(None if None in (s, first) else s - first for s in others)]


def write_comparison(runs: Sequence[EvalRun], comparison: dict[str, Any], out: str | Path) -> Path:
    """Writes compare.json, compare.csv and compare.html into a folder and returns the path of the page."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "compare.json", comparison)
    write_text(out / "compare.csv", csv_text(item_rows(comparison)))
    names = [run["name"] for run in comparison["runs"]]
    changed = most_changed(comparison)
    wanted = image_order(runs, changed)
    images = embed(wanted)
    return write_page(
        out / "compare.html",
        "compare.html",
        comparison=comparison,
        names=names,
        cards=headlines(comparison),
        differences=difference_table(comparison),
        objections=objections(comparison),
        settings=[["", *names], *([name, *map(str, values)] for name, values in comparison["settings"].items())],
        items=[
            {"change": change(comparison["items"][i]["scores"]), "cards": [item_card(run, run.items[i], images, out) for run in runs]}
            for i in changed
        ],
        orders=ORDERS,
        left_out=f"The {len(changed)} items whose score changed most, {names[0]} first. {left_out(wanted, images)}",
    )


def headlines(comparison: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The headline of every run: name of the run, value, and a note with its interval and its difference to the first run's."""
    heads = [run["headline"] for run in comparison["runs"]]
    cards = []
    for run, head in zip(comparison["runs"], heads):
        value, between = format_estimate(head | {"ci95": head.get("interval")})
        minus = "" if head is heads[0] or None in (head["value"], heads[0]["value"]) else f"{head['value'] - heads[0]['value']:+.4f}"
        said = (head["name"], f"95% interval {between}" * bool(between), f"{minus} against {comparison['runs'][0]['name']}" * bool(minus))
        cards.append((run["name"], value, "; ".join(filter(None, said))))
    return cards


def objections(comparison: dict[str, Any]) -> list[tuple[str, str]]:
    """Name of a run and why its headline is not comparable with published numbers, for every such run."""
    return [(run["name"], "; ".join(run["not_comparable"])) for run in comparison["runs"] if run["not_comparable"]]


def difference_table(comparison: dict[str, Any]) -> list[list[TableCell]]:
    """Mean scores and differences, overall and per category."""
    first, *others = (run["name"] for run in comparison["runs"])
    table: list[list[TableCell]] = [["", "items", first, *others, *(f"{other} minus {first}" for other in others)]]
    for r in comparison["rows"]:
        table.append([r["name"], str(r["items"]), *map(format_number, r["means"]), *(difference(d, r["items"]) for d in r["differences"])])
    return table


def difference(measured: dict[str, Any], items: int) -> TableCell:
    """A difference with its interval, and the number of items that have a score in both runs where that is not all."""
    value, between = format_estimate(measured, "+.4f")
    paired = "" if measured["items"] == items else f"{measured['items']} items"
    return value, ", ".join(filter(None, (between, paired)))
