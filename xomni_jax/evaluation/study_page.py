"""The two studies for readers: tables for a terminal, and a page, numbers and a line per setting in files."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from xomni_jax.checkpoint.store import write_json
from xomni_jax.evaluation.charts import Line, line_chart
from xomni_jax.evaluation.compare import show, signed
from xomni_jax.evaluation.markup import decimal, document, figure, interval, section, table, write_text

GUIDANCE_TEXT = (
    "The score of an item is the suite's own, 0 to 1; means with 95% bootstrap intervals over items, differences paired by item. "
    "Guidance 1 is off."
)
BEST_TEXT = (
    "The score of an item is the suite's own, 0 to 1. Best of N is the mean over all choices of N of the SFT samples of an item, exactly; "
    "intervals are 95% bootstraps over items, differences paired by item. The headline of the first N is the suite's own number over one "
    "image per item, the best of its first N."
)
ORACLE = "The reward that picks is the score itself, which knows what was asked for: an oracle that nobody has when drawing."


def write_study(study: dict[str, Any], name: str, out: str | Path) -> Path:
    """Writes OUT/name.json, .csv and .html; `name` is guidance or best_of_n. Returns the path of the page."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    lines, page = {"guidance": (guidance_lines, guidance_page), "best_of_n": (best_of_lines, best_of_page)}[name]
    write_json(out / f"{name}.json", study)
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(lines(study))
    write_text(out / f"{name}.csv", file.getvalue())
    return write_text(out / f"{name}.html", page(study))


# ---- guidance ----
def guidance_lines(study: dict[str, Any]) -> list[list[Any]]:
    """Rows of the CSV, the head first."""
    categories = list(study["rows"][0]["categories"])
    head = ["guidance", study["headline"], "score", "low", "high", "minus_off", "minus_off_low", "minus_off_high", *categories]
    rows = [
        [r["guidance"], r["headline"], *spread_out(r["score"]), *spread_out(r["minus_off"]), *(r["categories"].get(c) for c in categories)]
        for r in study["rows"]
    ]
    return [head, *rows]


def guidance_text(study: dict[str, Any]) -> str:
    """The table for a terminal."""
    lines = [f"{study['title']}: {study['items']} items", f"guidance  {study['headline'][:16]:>16}  mean score" + " " * 22 + "minus off"]
    for r in study["rows"]:
        minus = "" if r["minus_off"] is None else estimate(r["minus_off"], "+.4f")
        lines.append(f"{r['guidance']:>8g}  {show(r['headline']):>16}  {estimate(r['score'], '.4f'):<30}  {minus}")
    return "\n".join(lines)


def guidance_page(study: dict[str, Any]) -> str:
    """The page."""
    rows = study["rows"]
    head = ["", escape(study["headline"]), "mean score", "minus off"]
    body = [
        (
            f"guidance {r['guidance']:g}" + " (off)" * (r["guidance"] == 1),
            [decimal(r["headline"], 4), cell(r["score"], ".4f"), "" if r["minus_off"] is None else cell(r["minus_off"], "+.4f")],
        )
        for r in rows
    ]
    categories = list(rows[0]["categories"])
    per = [(escape(c), [decimal(r["categories"].get(c), 4) for r in rows]) for c in categories]
    parts = [
        header(study, "guidance off and on"),
        section("Scores", table(head, body), "", GUIDANCE_TEXT),
        section("Mean score by guidance", figure(score_chart(rows, "guidance", "guidance"), study["title"]), "few"),
        section("By category", table(("", *(f"guidance {r['guidance']:g}" for r in rows)), per)) if per else "",
        section("Runs", table(("", "run"), [(f"guidance {r['guidance']:g}", [escape(r["run"])]) for r in rows])),
    ]
    return document(f"{escape(study['title'])}: guidance", "".join(parts), "gallery.css")


# ---- best of N ----
def best_of_lines(study: dict[str, Any]) -> list[list[Any]]:
    """Rows of the CSV, the head first; RL's single sample is the last."""
    head = ["policy", "best_of", "score", "low", "high", "rl_minus", "rl_minus_low", "rl_minus_high", "headline_of_first_n"]
    rows = [["sft", r["n"], *spread_out(r["score"]), *spread_out(r["rl_minus"]), r["headline_of_first_n"]] for r in study["rows"]]
    return [head, *rows, ["rl", 1, *spread_out(study["rl"]["score"]), "", "", "", study["rl"]["headline"]]]


def best_of_text(study: dict[str, Any]) -> str:
    """The table for a terminal, and the verdict."""
    lines = [f"{study['title']}: {study['items']} items, reward: {study['reward']}"]
    lines.append(f"{'':<16}  {'mean score':<30}  {'RL minus it':<32}  {study['headline']} of the first N")
    for r in study["rows"]:
        first = f"{estimate(r['score'], '.4f'):<30}  {estimate(r['rl_minus'], '+.4f'):<32}"
        lines.append(f"{row_name(r['n']):<16}  {first}  {show(r['headline_of_first_n'])}")
    lines.append(f"{'RL':<16}  {estimate(study['rl']['score'], '.4f'):<30}  {'':<32}  {show(study['rl']['headline'])} (all its samples)")
    return "\n".join([*lines, verdict(study)])


def best_of_page(study: dict[str, Any]) -> str:
    """The page."""
    head = ["", "mean score", "RL minus it", f"{escape(study['headline'])} of the first N"]
    body = [
        (row_name(r["n"]), [cell(r["score"], ".4f"), cell(r["rl_minus"], "+.4f"), decimal(r["headline_of_first_n"], 4)])
        for r in study["rows"]
    ]
    body.append(("RL", [cell(study["rl"]["score"], ".4f"), "", f"{decimal(study['rl']['headline'], 4)}<small>all its samples</small>"]))
    level = None if study["rl"]["score"]["value"] is None else ("RL, one sample", study["rl"]["score"]["value"])
    powers = [r | {"log2": math.log2(r["n"])} for r in study["rows"]]
    chart = score_chart(powers, "log2", "N", level, {p["log2"]: str(p["n"]) for p in powers})
    note = f"{BEST_TEXT} {ORACLE if study['reward'] == 'score' else 'Picked by the reward ' + study['reward'] + '.'}"
    runs = [("SFT", [escape(", ".join(study["sft"]["runs"]))]), ("RL", [escape(", ".join(study["rl"]["runs"]))])]
    parts = [
        header(study, "one RL sample against the best of N"),
        f"<p class=lead>{escape(verdict(study))}</p>",
        section("Scores", table(head, body, ("RL",)), "", note),
        section("Mean score of SFT's best of N", figure(chart, study["title"]), "few"),
        section("Runs", table(("", "runs"), runs)),
    ]
    return document(f"{escape(study['title'])}: best of N", "".join(parts), "gallery.css")


def verdict(study: dict[str, Any]) -> str:
    """Up to which N one RL sample holds, in words, and which N could not be measured."""
    held, largest = study["rl_holds_up_to_best_of"], study["rows"][-1]["n"]
    said = "One RL sample scores "
    if held == 0:
        said += "no higher than one SFT sample"
    else:
        said += "above one SFT sample" if held == 1 else f"above the best of {held} SFT samples"
        said += "" if held == largest else f", not above the best of {2 * held}"
    out = study["left_out"]
    return said + (f". Best of {', '.join(map(str, out))} needs more than {study['sft']['samples']} samples per item" if out else "") + "."


def row_name(n: int) -> str:
    """SFT, or its best of N."""
    return "SFT" if n == 1 else f"SFT best of {n}"


# ---- both ----
def header(study: dict[str, Any], what: str) -> str:
    """Title of the page."""
    return (
        f"<header><p class=over>X-Omni in JAX</p><h1>{escape(study['title'])}: {what}</h1>"
        f"<p class=lead>{study['items']} items of {escape(study['suite'])}.</p></header>"
    )


def score_chart(rows: Sequence[dict[str, Any]], x: str, x_label: str, level: Any = None, x_ticks: Any = None) -> str:
    """Mean scores with their band; empty when none is known."""
    known = [r for r in rows if r["score"]["value"] is not None]
    low, high = ([r["score"]["ci95"][end] for r in known] for end in (0, 1))
    line = Line("score", [r[x] for r in known], [r["score"]["value"] for r in known], low, high, dots=True)
    return line_chart([line], x_label, None, level, x_ticks)


def cell(estimated: dict[str, Any], form: str) -> str:
    """A value with its interval as HTML."""
    value = signed(estimated["value"]) if form.startswith("+") else decimal(estimated["value"], 4)
    return value + interval(estimated["ci95"], form=form)


def estimate(estimated: dict[str, Any], form: str) -> str:
    """A value with its interval as text."""
    if estimated["value"] is None:
        return "-"
    low, high = estimated["ci95"]
    return f"{estimated['value']:{form}} [{low:{form}}, {high:{form}}]"


def spread_out(estimated: dict[str, Any] | None) -> list[Any]:
    """Value, low, high for a CSV; empty where there is none."""
    if estimated is None or estimated["value"] is None:
        return ["", "", ""]
    return [estimated["value"], *estimated["ci95"]]
