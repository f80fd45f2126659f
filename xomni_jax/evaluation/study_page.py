"""What `xomni eval guidance` and `xomni eval best-of-n` print and write: a table, a page, all numbers, and one CSV line per setting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xomni_jax.checkpoint.store import write_json
from xomni_jax.core.tables import TableCell, aligned, csv_text, format_estimate, format_number
from xomni_jax.evaluation.charts import Line, line_chart
from xomni_jax.evaluation.pages import write_page, write_text

GUIDANCE_NOTE = (
    "The score of an item is the suite's own, 0 to 1; means with 95% bootstrap intervals over items, differences paired by item. "
    "Guidance 1 is off."
)
BEST_OF_NOTE = (
    "The score of an item is the suite's own, 0 to 1. Best of N is the exact mean over all choices of N of the SFT samples of an item; "
    "intervals are 95% bootstraps over items, differences paired by item. The headline of the first N is the suite's own number over one "
    "image per item, the best of its first N."
)
ORACLE_NOTE = "The reward that picks is the score itself, which knows what was asked for: an oracle, which no user has."


def write_study(study: dict[str, Any], name: str, out: str | Path) -> Path:
    """Writes OUT/name.json, .csv and .html; `name` is guidance or best_of_n. Returns the path of the page."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    rows, page = {"guidance": (guidance_rows, guidance_page), "best_of_n": (best_of_rows, best_of_page)}[name]
    write_json(out / f"{name}.json", study)
    write_text(out / f"{name}.csv", csv_text(rows(study)))
    return write_page(out / f"{name}.html", "study.html", study=study, **page(study))


# ---- guidance ----
def guidance_rows(study: dict[str, Any]) -> list[list[Any]]:
    """Rows of the CSV."""
    categories = list(study["rows"][0]["categories"])
    head = ["guidance", study["headline"], "score", "low", "high", "minus_off", "minus_off_low", "minus_off_high", *categories]
    return [
        head,
        *(
            [r["guidance"], r["headline"], *with_ends(r["score"]), *with_ends(r["minus_off"]), *map(r["categories"].get, categories)]
            for r in study["rows"]
        ),
    ]


def guidance_table(study: dict[str, Any]) -> list[list[TableCell]]:
    """The scores for readers."""
    table: list[list[TableCell]] = [["", study["headline"], "mean score", "minus off"]]
    for r in study["rows"]:
        name = guidance_name(r) + " (off)" * (r["guidance"] == 1)
        minus_off = "" if r["minus_off"] is None else format_estimate(r["minus_off"], "+.4f")
        table.append([name, format_number(r["headline"]), format_estimate(r["score"]), minus_off])
    return table


def guidance_text(study: dict[str, Any]) -> str:
    """The study for a terminal."""
    return f"{study['title']}: {study['items']} items\n{aligned(guidance_table(study))}"


def guidance_page(study: dict[str, Any]) -> dict[str, Any]:
    """Values of the template."""
    rows = study["rows"]
    names, categories = [guidance_name(r) for r in rows], list(rows[0]["categories"])
    return dict(
        title="guidance",
        heading="guidance off and on",
        verdict="",
        note=GUIDANCE_NOTE,
        scores=guidance_table(study),
        chart_title="Mean score by guidance",
        score_chart=score_chart(study, "guidance"),
        categories=categories and [["", *names], *([c, *(format_number(r["categories"].get(c)) for r in rows)] for c in categories)],
        runs=[["", "run"], *([name, r["run"]] for name, r in zip(names, rows))],
    )


def guidance_name(row: dict[str, Any]) -> str:
    """Name of a row."""
    return f"guidance {row['guidance']:g}"


# ---- best of N ----
def best_of_rows(study: dict[str, Any]) -> list[list[Any]]:
    """Rows of the CSV; RL's single sample is the last."""
    head = ["policy", "best_of", "score", "low", "high", "rl_minus", "rl_minus_low", "rl_minus_high", "headline_of_first_n"]
    rows = [["sft", r["n"], *with_ends(r["score"]), *with_ends(r["rl_minus"]), r["headline_of_first_n"]] for r in study["rows"]]
    return [head, *rows, ["rl", 1, *with_ends(study["rl"]["score"]), "", "", "", study["rl"]["headline"]]]


def best_of_table(study: dict[str, Any]) -> list[list[TableCell]]:
    """The scores for readers."""
    table: list[list[TableCell]] = [["", "mean score", "RL minus it", f"{study['headline']} of the first N"]]
    for r in study["rows"]:
        name = "SFT" if r["n"] == 1 else f"SFT best of {r['n']}"
        rl_minus, first = format_estimate(r["rl_minus"], "+.4f"), format_number(r["headline_of_first_n"])
        table.append([name, format_estimate(r["score"]), rl_minus, first])
    rl = study["rl"]
    return [*table, ["RL", format_estimate(rl["score"]), "", (format_number(rl["headline"]), "all its samples")]]


def best_of_text(study: dict[str, Any]) -> str:
    """The study for a terminal, with the verdict."""
    head = f"{study['title']}: {study['items']} items, reward: {study['reward']}"
    return "\n".join([head, aligned(best_of_table(study)), verdict(study)])


def best_of_page(study: dict[str, Any]) -> dict[str, Any]:
    """Values of the template."""
    single = study["rl"]["score"]["value"]
    return dict(
        title="best of N",
        heading="one RL sample against the best of N",
        verdict=verdict(study),
        note=f"{BEST_OF_NOTE} {ORACLE_NOTE if study['reward'] == 'score' else 'Picked by the reward ' + study['reward'] + '.'}",
        scores=best_of_table(study),
        chart_title="Mean score of SFT's best of N",
        score_chart=score_chart(study, "n", None if single is None else ("RL, one sample", single)),
        categories=None,
        runs=[["", "runs"], *([name, ", ".join(study[policy]["runs"])] for name, policy in (("SFT", "sft"), ("RL", "rl")))],
    )


def verdict(study: dict[str, Any]) -> str:
    """The largest N whose best one RL sample exceeds, and which N could not be measured."""
    held, largest, missing = study["rl_holds_up_to_best_of"], study["rows"][-1]["n"], study["left_out"]
    beaten = {0: "no higher than one SFT sample", 1: "above one SFT sample"}.get(held, f"above the best of {held} SFT samples")
    limit = "" if held in (0, largest) else f", not above the best of {2 * held}"
    more = f". Best of {', '.join(map(str, missing))} needs more than {study['sft']['samples']} samples per item" if missing else ""
    return f"One RL sample scores {beaten}{limit}{more}."


# ---- both ----
def score_chart(study: dict[str, Any], x: str, level: tuple[str, float] | None = None) -> str:
    """Mean scores with their band over guidance or over n; empty when none is known."""
    known = [r for r in study["rows"] if r["score"]["value"] is not None]
    low, high = ([r["score"]["ci95"][end] for r in known] for end in (0, 1))
    line = Line("score", [r[x] for r in known], [r["score"]["value"] for r in known], low, high, dots=True)
    return line_chart(study["title"], [line], {"n": "N"}.get(x, x), level=level, powers_of_two=x == "n")


def with_ends(measured: dict[str, Any] | None) -> Sequence[float | None]:
    """Value, low, high for a CSV."""
    return (None,) * 3 if measured is None or measured["value"] is None else (measured["value"], *measured["ci95"])
