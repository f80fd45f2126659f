"""The results of an evaluation: scores every item, aggregates, and writes items.jsonl and results.json.

results.json holds, beside the suite's own numbers:

    headline     {"name", "value", "stderr", "interval": [low, high] or null}: 95%, clustered by image or prompt; null where unknown
    comparable   {"yes": bool, "because": [clause, ...]}: may the headline stand beside published numbers, see `comparable`
    unparsed     ids of items some replies of which could not be read; unscored: of those without any readable reply, which are left out
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from xomni_jax.evaluation.comparable import departures
from xomni_jax.evaluation.run_directory import json_line, pretty_json
from xomni_jax.evaluation.statistics import NORMAL, jackknife_error
from xomni_jax.evaluation.suite import Item, Record, Suite, SuiteError, is_unreadable
from xomni_jax.evaluation.suite_run import SuiteRun

NOT_READ = "not scored: the judge's reply cannot be read"


def score_outputs(suite: Suite, item: Item, outputs: Sequence[Any]) -> Record | None:
    """The record of an item; None when no reply of its judge can be read. Outputs without a readable reply take no part in the score."""
    lost = [isinstance(replies, list) and bool(replies) and all(map(is_unreadable, replies)) for replies in outputs]
    if all(lost):
        return None
    record = suite.score(item, [replies for replies, is_lost in zip(outputs, lost) if not is_lost])
    if any(lost):
        record["unparsed"] += sum(lost)
        for name, placeholder in (("verdicts", NOT_READ), ("read", "")):
            if name in record:
                made = iter(record[name])
                record[name] = [placeholder if is_lost else next(made) for is_lost in lost]
    return record


def write_results(run: SuiteRun) -> dict[str, Any]:
    """Scores every selected item once, sorted by id, aggregates, and writes items.jsonl and results.json. Nothing may be missing.

    Raises:
      SuiteError: no item has a readable reply.
    """
    suite, outputs, judged = run.suite, run.outputs(), run.judged() if run.judge_kind else {}
    lines, records, unscored, clusters = [], [], [], {}
    for item in sorted(run.items, key=lambda item: item.id):
        output, replies = outputs.get(item.id, {}), judged.get(item.id, {}).get("replies")
        # What a judge read from an answer takes the answer's place.
        scored = replies if suite.judge else [reply for (reply,) in filter(None, replies or ()) if not is_unreadable(reply)]
        scored = scored or [output["answer"]]
        record = score_outputs(suite, item, scored)
        lines.append(json_line(_line(run, item, output, replies, record)))
        if record is None:
            unscored.append(item.id)
            continue
        records.append({**record, "id": item.id, "fields": item.fields})
        clusters.setdefault(output.get("image") or item.image or item.id, []).append(records[-1])
    if not records:
        raise SuiteError(f"{suite.name}: no item has a reply that can be read; delete {run.path / 'judged'} and give another judge")
    found, made = suite.aggregate(records), [outputs.get(item.id, {}) for item in run.items]
    settings = run.directory.read("settings.json") if (run.path / "settings.json").exists() else None
    judge = run.directory.read("judged/judge.json") if run.judge_kind else None
    because = departures(run, judge, settings or {}, len(unscored))
    results = {
        "suite": suite.name,
        "title": suite.title,
        "headline": _headline(suite, found, list(clusters.values())),
        "comparable": {"yes": not because, "because": because},
        "scores": found["scores"],
        "categories": found["categories"],
        "counts": {
            "items": len(run.items),
            "published": suite.published,
            "outputs": len(run.items) * suite.repeats,
            "unparsed": sum(record["unparsed"] for record in records),
            "unscored items": len(unscored),
            "unanswered": sum(bool(output.get("unanswered")) for output in made),
            "overlong prompts": sum(bool(output.get("overlong")) for output in made),
            "fitted images": sum(bool(output.get("fitted")) for output in made),
        },
        "unparsed": [record["id"] for record in records if record["unparsed"]],
        "unscored": unscored,
        "notes": found.get("notes", []),
        "settings": settings,
        "judge": judge,
        "switches": sorted(suite.on),
        "instructions": dict(run.config.instructions),
    }
    run.directory.write("items.jsonl", "".join(lines))
    run.directory.write("results.json", pretty_json(results))
    return results


def _line(run: SuiteRun, item: Item, output: Mapping[str, Any], replies: Any, record: Record | None) -> dict[str, Any]:
    """A line of items.jsonl."""
    made = {"images": output.get("files", [])} if run.suite.task == "generate" else {"answer": output["answer"]}
    made |= {} if replies is None else {"replies": replies}
    record = record or {"score": None, "verdicts": [NOT_READ] * len(replies)}
    apart = {name: record[name] for name in ("score", "verdicts")}
    more = {name: value for name, value in record.items() if name not in apart}
    place = {"id": item.id, "position": run.positions[item.id]}
    return {**place, "prompt": item.prompt, "fields": dict(item.fields), **made, **apart, "record": more}


def _headline(suite: Suite, found: Mapping[str, Any], clusters: Sequence[Sequence[Record]]) -> dict[str, Any]:
    """The suite's main number with its standard error, clustered by image or prompt, and 95% interval."""
    name = found["headline"]
    value, error = found["scores"][name], jackknife_error(clusters, functools.partial(_value, suite))
    interval = [value - NORMAL * error, value + NORMAL * error] if value is not None and math.isfinite(error) else None
    return {"name": name, "value": value, "stderr": error if interval else None, "interval": interval}


def _value(suite: Suite, records: list[Record]) -> float | None:
    """The headline of some records; None where the suite has none for them."""
    try:
        found = suite.aggregate(sorted(records, key=lambda record: record["id"]))
    except (SuiteError, ZeroDivisionError):
        return None
    return found["scores"][found["headline"]]
