"""Two studies over finished runs of any suite that draws: what guidance changes, and one RL sample against SFT's best of N.

Runs are made by `xomni eval SUITE`; a study reads their directories and draws nothing, so it takes seconds and is exact to repeat.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xomni_jax.checkpoint.store import write_json
from xomni_jax.core.folders import write_text
from xomni_jax.core.tables import TableCell, aligned, csv_text, format_estimate, format_number
from xomni_jax.evaluation import suite as contract
from xomni_jax.evaluation.charts import Line, line_chart
from xomni_jax.evaluation.compare import labels
from xomni_jax.evaluation.eval_run import EvalRun, Item, command, outputs, read_eval_run, same_items
from xomni_jax.evaluation.pages import write_page
from xomni_jax.evaluation.paper import category_order
from xomni_jax.evaluation.results import score_outputs
from xomni_jax.evaluation.statistics import (
    BEST_OF,
    best_of_weights,
    bootstrap_mean,
    held_up_to,
    paired_difference,
    weighted_rows,
    with_bounds,
)
from xomni_jax.evaluation.suite import SuiteError
from xomni_jax.evaluation.suites import get_suite

OWN = "score"  # the reward that is the suite's own score of an output
# Settings that may differ between runs of one experiment: they change images by rounding at most.
INCIDENTAL = ("model.path", "data.path", "batch", "decode_batch", "mesh.", "device", "versions.")


def read_runs(directories: Sequence[str | Path], changes: Sequence[Mapping[str, Any]]) -> list[EvalRun]:
    """The runs of one suite that draws, on the same items.

    Args:
      changes: per directory, the options in which it is meant to differ, for the command that makes a missing one.

    Raises:
      SuiteError: runs are missing (with the commands that make them), of different suites or items, or hold answers.
    """
    missing = [i for i, directory in enumerate(directories) if not (Path(directory) / "results.json").is_file()]
    runs = [read_eval_run(directory) for i, directory in enumerate(directories) if i not in missing]
    if missing:
        suite, settings = (runs[0].suite, runs[0].settings) if runs else ("SUITE", {})
        lines = [command(suite, directories[i], settings, **changes[i]) for i in missing]
        many = f"{len(missing)} of {len(directories)} runs are not there or not finished"
        raise SuiteError("\n  ".join([f"{many}; make them with", *lines]))
    same_items(runs)
    if "answer" in runs[0].items[0]:
        raise SuiteError(f"{runs[0].suite} answers questions; this study is about suites that draw, such as longtext-en")
    return runs


def check_settings(runs: Sequence[EvalRun], varied: Iterable[str]) -> None:
    """SuiteError naming the first setting, apart from the varied ones, in which a run differs from the first."""
    free = (*varied, *INCIDENTAL)
    first = runs[0]
    for run in runs[1:]:
        for name in dict.fromkeys((*first.flat_settings, *run.flat_settings)):
            ours, theirs = first.flat_settings.get(name), run.flat_settings.get(name)
            if ours != theirs and not any(name == f or (f.endswith(".") and name.startswith(f)) for f in free):
                raise SuiteError(
                    f"{run.path}: {name} is {theirs}, in {first.path} it is {ours}; a difference would not come from what is studied"
                )


# ---- guidance ----
def guidance_study(runs: Sequence[EvalRun], seed: int = 0) -> dict[str, Any]:
    """The score over guidance values, each against guidance off (1).

    Raises:
      SuiteError: the runs differ in more than guidance, none is at 1, none at another value, or two are at the same.
    """
    check_settings(runs, ["sampling.guidance"])
    by_value: dict[float, EvalRun] = {}
    for run in runs:
        value = run.flat_settings.get("sampling.guidance")
        if value is None:
            raise SuiteError(f"{run.path}: its settings name no guidance; draw the images with xomni eval")
        if value in by_value:
            raise SuiteError(f"{by_value[value].path} and {run.path} both have guidance {value:g}; give one run per value")
        by_value[float(value)] = run
    if 1.0 not in by_value or len(by_value) < 2:
        made = command(runs[0].suite, "RUN", runs[0].settings, guidance="1.0" if 1.0 not in by_value else "2.0")
        raise SuiteError(f"a run with guidance off (1) and one with guidance on are needed; make the other with\n  {made}")
    off = by_value[1.0].scores
    rows = [
        {
            "guidance": value,
            "run": str(run.path),
            "headline": run.results["headline"]["value"],
            "score": with_bounds(bootstrap_mean(run.scores, seed)),
            "minus_off": None if value == 1.0 else with_bounds(paired_difference(run.scores, off, seed)),
            "categories": {name: run.results["categories"][name]["score"] for name in category_order(run)},
        }
        for value, run in sorted(by_value.items())
    ]
    return about(runs[0], seed) | {"rows": rows}


def about(run: EvalRun, seed: int) -> dict[str, Any]:
    """What a study is about."""
    head = run.results["headline"]["name"]
    return {"suite": run.suite, "title": run.results["title"], "headline": head, "items": len(run.items), "seed": seed}


# ---- best of N ----
def best_of_study(
    sft: Sequence[EvalRun], rl: Sequence[EvalRun], reward: str = OWN, selection_PR: np.ndarray | None = None, seed: int = 0
) -> dict[str, Any]:
    """One RL sample against the best of N SFT samples, picked by a reward.

    Args:
      sft, rl: runs of the two models. Several runs of one model differ in the seed alone: their samples are pooled.
      reward: name of the reward that picks.
      selection_PR: its values of SFT's samples [P, R], runs side by side; without it the suite's own score picks, which knows the answer.

    Raises:
      SuiteError: runs that differ in more than model and seed, seeds used twice, or one SFT sample per item.
    """
    check_policies(sft, rl)
    score_PR, rl_PR = pooled_scores(sft), pooled_scores(rl)
    samples = score_PR.shape[1]
    if samples < 2:
        more = command(sft[0].suite, f"{sft[0].path}-more", sft[0].settings, seed=int(sft[0].flat_settings.get("seed", 1234)) + 1)
        raise SuiteError(f"there is one SFT sample per item; add runs with other seeds: {more}")
    selection_PR = score_PR if selection_PR is None else selection_PR
    suite = get_suite(sft[0].suite, sft[0].results.get("switches") or ())
    rl_P = weighted_rows(rl_PR, np.ones_like(rl_PR))
    best = {n: weighted_rows(score_PR, best_of_weights(selection_PR, n)) for n in BEST_OF if n <= samples}
    single, means = bootstrap_mean(rl_P, seed), {n: bootstrap_mean(best_P, seed) for n, best_P in best.items()}
    return about(sft[0], seed) | {
        "reward": reward,
        "sft": {"runs": [str(run.path) for run in sft], "samples": samples},
        "rl": {
            "runs": [str(run.path) for run in rl],
            "samples": rl_PR.shape[1],
            "score": with_bounds(single),
            "headline": rl[0].results["headline"]["value"] if len(rl) == 1 else None,
        },
        "rows": [
            {
                "n": n,
                "score": with_bounds(means[n]),
                "rl_minus": with_bounds(paired_difference(rl_P, best_P, seed)),
                "headline_of_first_n": headline_of_picks(suite, sft, selection_PR[:, :n]),
            }
            for n, best_P in best.items()
        ],
        "left_out": [n for n in BEST_OF if n > samples],
        "rl_holds_up_to_best_of": held_up_to(single.value, {n: mean.value for n, mean in means.items()}),
    }


def check_policies(sft: Sequence[EvalRun], rl: Sequence[EvalRun]) -> None:
    """SuiteError unless the runs are of two models, differ in nothing else, and those of one model have different seeds."""
    for runs in (sft, rl):
        check_settings(runs, ["seed"])
        seeds = [run.flat_settings.get("seed") for run in runs]
        if len(set(seeds)) < len(seeds):
            raise SuiteError(f"{', '.join(labels(runs))} have the seeds {seeds}; runs of one seed hold the same samples")
    check_settings([sft[0], rl[0]], ["seed", "model.sha256", "model.adapter", "repeats"])
    if sft[0].flat_settings.get("model.sha256") == rl[0].flat_settings.get("model.sha256") is not None:
        raise SuiteError(f"{sft[0].path} and {rl[0].path} are runs of the same model; give runs of the SFT and of the RL model")


def pooled_scores(runs: Sequence[EvalRun]) -> np.ndarray:
    """The suite's score of every single output [P, R], runs side by side; NaN where an output has none."""
    suite = get_suite(runs[0].suite, runs[0].results.get("switches") or ())
    rows = []
    for items in zip(*(run.items for run in runs)):
        rows.append([(output_record(suite, item, r) or {}).get("score") for item in items for r in range(outputs(item))])
    if len({len(row) for row in rows}) > 1:
        raise SuiteError(f"{runs[0].path}: items have different numbers of outputs; draw them with one setting of repeats")
    return np.array([[np.nan if score is None else score for score in row] for row in rows], np.float64)


def output_record(suite: contract.Suite, item: Item, repeat: int) -> contract.Record | None:
    """The record of an item as if it had this output alone; None when no reply about it can be read."""
    asked = contract.Item(item["id"], item["prompt"], item["fields"])
    return score_outputs(suite, asked, [item["replies"][repeat]])


def headline_of_picks(suite: contract.Suite, runs: Sequence[EvalRun], selection_PR: np.ndarray) -> float | None:
    """The suite's own number over one output per item, the one that the reward likes best; of equals the first."""
    if np.isnan(selection_PR).all(1).any():
        return None
    records = []
    for i, pick in enumerate(np.nanargmax(selection_PR, 1)):
        places = [(run.items[i], r) for run in runs for r in range(outputs(run.items[i]))]
        item, repeat = places[pick]
        if record := output_record(suite, item, repeat):
            records.append(record | {"id": item["id"], "fields": item["fields"]})
    found = suite.aggregate(records)
    return found["scores"][found["headline"]]


# ---- for readers ----
SCORES = "The score of an item is the suite's own, 0 to 1; intervals are 95% bootstraps over items, differences are paired by item."
GUIDANCE_NOTE = f"{SCORES} Guidance 1 is off."
BEST_OF_NOTE = (
    f"{SCORES} Best of N is the exact mean over all choices of N of the SFT samples of an item. The headline of the first N is the suite's "
    "own number over one image per item, the best of its first N."
)
ORACLE_NOTE = "The reward that picks is the score itself, which knows what was asked for: an oracle, which no user has."


class View(NamedTuple):
    """What readers see of a study: `csv` are the rows of the CSV file, `scores` the main numbers by name, the rest is for study.html."""

    heading: str
    verdict: str
    note: str
    scores: dict[str, dict[str, Any]]
    table: list[list[TableCell]]
    csv: list[list[Any]]
    chart_title: str
    chart: str
    categories: list[list[TableCell]]
    runs: list[list[TableCell]]


def study_text(study: dict[str, Any], name: str) -> str:
    """The study for a terminal."""
    view = VIEWS[name](study)
    return "\n".join([f"{study['title']}: {study['items']} items", aligned(view.table), *[view.verdict] * bool(view.verdict)])


def write_study(study: dict[str, Any], name: str, out: str | Path) -> Path:
    """Writes OUT/name.json, .csv and .html; `name` is one of `VIEWS`. Returns the path of the page."""
    out, view = Path(out), VIEWS[name](study)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{name}.json", study)
    write_text(out / f"{name}.csv", csv_text(view.csv))
    shown = {row: format_estimate(score) for row, score in view.scores.items()}
    cards = [(row, value, f"mean score of an item; 95% interval {between or 'unknown'}") for row, (value, between) in shown.items()]
    return write_page(out / f"{name}.html", "study.html", study=study, view=view, cards=cards)


def guidance_view(study: dict[str, Any]) -> View:
    """The score over guidance."""
    rows = {f"guidance {r['guidance']:g}" + " (off)" * (r["guidance"] == 1): r for r in study["rows"]}
    categories = list(study["rows"][0]["categories"])
    columns = ["guidance", study["headline"], "score", "low", "high", "minus_off", "minus_off_low", "minus_off_high"]
    minus_off = {name: "" if r["minus_off"] is None else format_estimate(r["minus_off"], "+.4f") for name, r in rows.items()}
    return View(
        heading="guidance off and on",
        verdict="",
        note=GUIDANCE_NOTE,
        scores={name: r["score"] for name, r in rows.items()},
        table=[
            ["", study["headline"], "mean score", "minus off"],
            *([n, format_number(r["headline"]), format_estimate(r["score"]), minus_off[n]] for n, r in rows.items()),
        ],
        csv=[
            [*columns, *sorted(categories)],
            *(
                [
                    r["guidance"],
                    r["headline"],
                    *with_ends(r["score"]),
                    *with_ends(r["minus_off"]),
                    *map(r["categories"].get, sorted(categories)),
                ]
                for r in study["rows"]
            ),
        ],
        chart_title="Mean score by guidance",
        chart=score_chart(study, "guidance"),
        categories=categories
        and [["", *rows], *([c, *(format_number(r["categories"].get(c)) for r in rows.values())] for c in categories)],
        runs=[["", "run"], *([name, r["run"]] for name, r in rows.items())],
    )


def best_of_view(study: dict[str, Any]) -> View:
    """RL's single sample against SFT's best of N."""
    rows, rl = {"SFT" if r["n"] == 1 else f"SFT best of {r['n']}": r for r in study["rows"]}, study["rl"]
    single, own = rl["score"]["value"], study["reward"] == OWN
    return View(
        heading="one RL sample against the best of N",
        verdict=verdict(study),
        note=f"{BEST_OF_NOTE} {ORACLE_NOTE if own else 'Picked by the reward ' + study['reward'] + '.'}",
        scores={"RL, one sample": rl["score"]} | {name: r["score"] for name, r in rows.items()},
        table=[
            ["", "mean score", "RL minus it", f"{study['headline']} of the first N"],
            *(
                [n, format_estimate(r["score"]), format_estimate(r["rl_minus"], "+.4f"), format_number(r["headline_of_first_n"])]
                for n, r in rows.items()
            ),
            ["RL", format_estimate(rl["score"]), "", (format_number(rl["headline"]), "all its samples")],
        ],
        csv=[
            ["policy", "best_of", "score", "low", "high", "rl_minus", "rl_minus_low", "rl_minus_high", "headline_of_first_n"],
            *(["sft", r["n"], *with_ends(r["score"]), *with_ends(r["rl_minus"]), r["headline_of_first_n"]] for r in study["rows"]),
            ["rl", 1, *with_ends(rl["score"]), "", "", "", rl["headline"]],
        ],
        chart_title="Mean score of SFT's best of N",
        chart=score_chart(study, "n", None if single is None else ("RL, one sample", single)),
        categories=[],
        runs=[["", "runs"], *([name, ", ".join(study[policy]["runs"])] for name, policy in (("SFT", "sft"), ("RL", "rl")))],
    )


VIEWS = {"guidance": guidance_view, "best_of_n": best_of_view}


def verdict(study: dict[str, Any]) -> str:
    """The largest N whose best one RL sample exceeds, and which N could not be measured."""
    held, largest, missing = study["rl_holds_up_to_best_of"], study["rows"][-1]["n"], study["left_out"]
    beaten = {0: "no higher than one SFT sample", 1: "above one SFT sample"}.get(held, f"above the best of {held} SFT samples")
    limit = "" if held in (0, largest) else f", not above the best of {2 * held}"
    more = f". Best of {', '.join(map(str, missing))} needs more than {study['sft']['samples']} samples per item" if missing else ""
    return f"One RL sample scores {beaten}{limit}{more}."


def score_chart(study: dict[str, Any], x: str, level: tuple[str, float] | None = None) -> str:
    """Mean scores with their band over guidance or over n; empty when none is known."""
    known = [r for r in study["rows"] if r["score"]["value"] is not None]
    low, high = ([r["score"]["ci95"][end] for r in known] for end in (0, 1))
    line = Line("score", [r[x] for r in known], [r["score"]["value"] for r in known], low, high, dots=True)
    return line_chart(study["title"], [line], {"n": "N"}.get(x, x), level=level, powers_of_two=x == "n")


def with_ends(measured: dict[str, Any] | None) -> Sequence[float | None]:
    """Value, low, high for a CSV."""
    return (None,) * 3 if measured is None or measured["value"] is None else (measured["value"], *measured["ci95"])
