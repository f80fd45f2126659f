"""Two or more runs of one suite, item by item: paired differences with bootstrap intervals, overall and per category."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from xomni_jax.checkpoint.store import write_json
from xomni_jax.evaluation.eval_run import EvalRun, read_eval_run, reading, same_items
from xomni_jax.evaluation.gallery import article, controls, embed, folded, image_order, left_out, output_figures, verdict
from xomni_jax.evaluation.markup import decimal, document, interval, section, table, write_text
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
    groups |= {name: categories == name for name in sorted(set(base.categories) - {""})}
    return {
        "suite": base.suite,
        "title": base.results["title"],
        "runs": [{"name": name, "path": str(run.path), "headline": run.results["headline"]} for name, run in zip(names, runs)],
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
    every = [run.facts for run in runs]
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
    first, *others = comparison["runs"]
    width = max(len(r["name"]) for r in comparison["rows"])
    lines = [f"{comparison['title']}: {comparison['rows'][0]['items']} items, differences to {first['name']}, 95% intervals"]
    for run in comparison["runs"]:
        lines.append(f"  {run['name']}: {run['headline']['name']} {show(run['headline']['value'])}")
    for name, values in comparison["settings"].items():
        lines.append(f"  {name}: " + " | ".join(map(str, values)))
    lines.append("")
    for i, other in enumerate(others):
        lines.append(f"{'mean score':<{width}}  items  {first['name'][:14]:>14}  {other['name'][:14]:>14}  difference")
        for r in comparison["rows"]:
            d = r["differences"][i]
            between = "" if d["ci95"] is None else f"  [{d['ci95'][0]:+.4f}, {d['ci95'][1]:+.4f}]"
            value = "-" if d["value"] is None else f"{d['value']:+.4f}"
            means = f"{show(r['means'][0]):>14}  {show(r['means'][i + 1]):>14}"
            lines.append(f"{r['name']:<{width}}  {d['items']:>5}  {means}  {value:>10}{between}")
        lines.append("")
    return "\n".join(lines)


def show(value: float | None) -> str:
    """Four decimals, or a dash."""
    return "-" if value is None else f"{value:.4f}"


def items_csv(comparison: dict[str, Any]) -> str:
    """One line per item: the score in every run, and each run's difference to the first."""
    names = [run["name"] for run in comparison["runs"]]
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(["id", "category", *names, *(f"{name} minus {names[0]}" for name in names[1:])])
    for item in comparison["items"]:
        scores = item["scores"]
        differences = ["" if None in (s, scores[0]) else s - scores[0] for s in scores[1:]]
        rows.writerow([item["id"], item["category"], *("" if s is None else s for s in scores), *differences])
    return file.getvalue()


def write_comparison(runs: Sequence[EvalRun], comparison: dict[str, Any], out: str | Path) -> Path:
    """Writes compare.json, compare.csv and compare.html into a folder and returns the path of the page."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    text = page(runs, comparison, out)
    write_json(out / "compare.json", comparison)
    write_text(out / "compare.csv", items_csv(comparison))
    return write_text(out / "compare.html", text)


def page(runs: Sequence[EvalRun], comparison: dict[str, Any], out: Path) -> str:
    """The comparison as HTML; links to images start from `out`."""
    names = [escape(run["name"]) for run in comparison["runs"]]
    changed = most_changed(comparison)
    wanted = image_order(runs, changed)
    images = embed(wanted)
    cards = "".join(pair_card(runs, names, comparison, i, images, out) for i in changed)
    said = f"The {len(changed)} items whose score changed most, {names[0]} first. {left_out(wanted, images)}"
    categories = [comparison["items"][i]["category"] for i in changed]
    listed = controls(categories, ORDERS) + f'<div id="items" class="items pairs">{cards}</div>' if changed else "<p>No score changed.</p>"
    title = f"{escape(comparison['title'])}: {', '.join(names[1:])} against {names[0]}"
    body = [
        f"<header><p class=over>X-Omni in JAX</p><h1>{title}</h1></header>",
        section("Scores", difference_table(comparison, names), "", METHOD),
        section("What differs between the runs", settings_table(comparison, names)) if comparison["settings"] else "",
        section("What changed most", listed, "", said),
    ]
    return document(title, "".join(body), "gallery.css", "gallery.js")


def difference_table(comparison: dict[str, Any], names: Sequence[str]) -> str:
    """Headline, then mean scores and differences, overall and per category."""
    head = ["", "items", *names, *(f"{name} minus {names[0]}" for name in names[1:])]
    heads = [run["headline"] for run in comparison["runs"]]
    gain = [None if None in (h["value"], heads[0]["value"]) else h["value"] - heads[0]["value"] for h in heads[1:]]
    count = str(comparison["rows"][0]["items"])
    rows = [(f"headline: {escape(heads[0]['name'])}", [count, *(decimal(h["value"], 4) for h in heads), *map(signed, gain)])]
    for r in comparison["rows"]:
        differences = (signed(d["value"]) + interval(d["ci95"], form="+.4f") for d in r["differences"])
        rows.append((escape(r["name"]), [str(r["items"]), *(decimal(m, 4) for m in r["means"]), *differences]))
    return table(head, rows, (OVERALL,))


def signed(value: float | None) -> str:
    """A difference, or a dash."""
    return "&ndash;" if value is None else f"{value:+.4f}"


def settings_table(comparison: dict[str, Any], names: Sequence[str]) -> str:
    """Settings that differ, one column per run."""
    rows = [(escape(n), [escape(str(v)) for v in values]) for n, values in comparison["settings"].items()]
    return f"<div class=wrap>{table(('', *names), rows)}</div>"


def pair_card(runs: Sequence[EvalRun], names: Sequence[str], comparison: dict[str, Any], i: int, images: dict, out: Path) -> str:
    """One item in every run, side by side."""
    sides = []
    for run, name, score in zip(runs, names, comparison["items"][i]["scores"]):
        item = run.items[i]
        shown = f"<p class=answer>{folded(reading(item, 0)) or '&empty;'}</p>{verdict(item, 0)}"
        if "answer" not in item:
            shown = f"<div class=images>{output_figures(run, item, images, out)}</div>"
        sides.append(f"<div><h4>{name}: {show(score)}</h4>{shown}</div>")
    item = runs[0].items[i]
    by = change(comparison["items"][i]["scores"])
    prompts = dict.fromkeys(run.items[i]["prompt"] for run in runs)  # rewritten prompts may differ
    prompt = "".join(f'<div class="prompt">{folded(text)}</div>' for text in prompts)
    return article(item, f"{prompt}<div class=runs>{''.join(sides)}</div>", by, f"{by:+.2f}")
