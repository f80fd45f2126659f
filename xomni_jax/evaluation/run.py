"""The evaluation engine: takes one suite from its data to the result file.

Work is divided by item. Every process takes its share of the items, skips those that any process has finished, and appends what it
finishes to a file of its own (see `run_directory`); the process that finds nothing missing writes the results. So a run can be stopped at
any point, and its results do not depend on how the work was divided: random keys belong to an item and repeat, batch shapes are fixed,
and records are aggregated in the order of their ids.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from xomni_jax.core.preemption import StopSignal
from xomni_jax.evaluation.run_directory import RunDirectory, json_line, pretty_json
from xomni_jax.evaluation.suite import Item, Judge, Suite, SuiteError, check_id
from xomni_jax.evaluation.suite_run import EvalConfig, SuiteRun, questions_hash
from xomni_jax.evaluation.suites import PUBLISHED, get_suite

if TYPE_CHECKING:
    from xomni_jax.pipeline import XOmni

JUDGE_BATCH = 4  # items in one call of a judge that does not say `batch` itself


@dataclass(frozen=True)
class Results:
    """What an evaluation has made: `values` is results.json, None while something is missing; `missing` counts such items."""

    run: SuiteRun
    values: dict[str, Any] | None
    missing: int = 0


@dataclass
class AllResults:
    """What `evaluate_all` has made. absent: suite -> why it was not run. failed: suite -> what went wrong."""

    done: list[Results] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def evaluate(
    config: EvalConfig,
    model: Callable[[], XOmni] | None = None,
    judge: Judge | None = None,
    stop: StopSignal | None = None,
    process: tuple[int, int] = (0, 1),
) -> Results:
    """Runs the phases of one suite, going on from what the run directory holds.

    Args:
      model: returns the model, called when outputs are to be made; evaluations that share a model share this function.
        Without it `config` says which model is opened.
      judge: in place of the one that `config` names.
      stop: polled between batches.
      process: (k, n) where n JAX processes hold one model together.

    Raises:
      SuiteError: data, judge or images are missing or do not fit.
      RunError: the directory was begun with other data or settings, or cannot be written.
      StopRequested: `stop` was requested; what is finished is kept.
    """
    return _finish(open_run(config, process), model, judge, stop or StopSignal())


def evaluate_all(config: EvalConfig, stop: StopSignal | None = None, process: tuple[int, int] = (0, 1)) -> AllResults:
    """Every published suite whose data lie in DATA/SUITE or DATA, into OUT/SUITE; one that fails does not keep the others from running."""
    from xomni_jax.evaluation.outputs import model_opener

    found, model = AllResults(), model_opener(config)
    for name in PUBLISHED:
        suite = get_suite(name)
        if config.phase not in ("all", suite.task, "score"):
            continue
        data, switches = Path(config.data) / name, [s for s in config.switches if s in suite.switches]
        one = dataclasses.replace(
            config, suite=name, switches=switches, data=data if data.is_dir() else config.data, out=Path(config.out) / name
        )
        try:
            run = open_run(one, process)
        except SuiteError as e:
            found.absent[name] = str(e)
            continue
        try:
            found.done.append(_finish(run, model, None, stop or StopSignal()))
        except ValueError as e:
            if process[1] > 1:
                raise  # the other processes do not know that this one failed
            found.failed[name] = str(e)
    return found


def open_run(config: EvalConfig, process: tuple[int, int] = (0, 1)) -> SuiteRun:
    """Reads the data and selects the items.

    Raises:
      SuiteError: the data are missing or malformed, or an id that was asked for does not exist.
      RunError: the directory was begun with other data.
    """
    suite = config.suite if isinstance(config.suite, Suite) else get_suite(config.suite, config.switches, config.instructions)
    if config.rewrite:
        from xomni_jax.evaluation.suites.rewriting import with_rewrites

        suite = with_rewrites(suite, config.rewrite, Path(config.out) / "rewritten.jsonl")
    directory, items = RunDirectory(config.out), suite.load(Path(config.data))
    known = {item.id for item in items}
    if len(known) < len(items):
        raise SuiteError(f"{suite.name}: {len(items) - len(known)} ids occur twice in {config.data}; ids must be unique")
    for item in items:
        check_id(item.id, suite.name)
    if unknown := [name for name in config.ids if name not in known]:
        raise SuiteError(f"{suite.name} has no item {unknown[0]!r}; ids are such as {items[0].id!r}")
    lines = sorted(json_line({"id": i.id, "prompt": i.prompt}) for i in items)  # not the fields: they decide no output
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    data = {"items": len(items), "rewritten": bool(config.rewrite), "sha256": digest}
    selected = [item for item in items if item.id in set(config.ids)] if config.ids else items[: config.limit]
    run = SuiteRun(config, suite, selected, data, directory, process)
    if run.writes and (run.path / "settings.json").exists():
        remedy = "take another --out, or the data, switches and rewritten prompts that it was begun with"
        directory.check("settings.json", {"suite": suite.name, "data": data}, remedy)
    return run


def _finish(run: SuiteRun, model: Callable[[], XOmni] | None, judge: Judge | None, stop: StopSignal) -> Results:
    """The phases of an opened run."""
    kind = run.suite.judge if run.scores else None
    with ExitStack() as stack:
        if kind and judge is None:  # first of all: that no judge answers is better known before hours of drawing
            from xomni_jax.evaluation.judges import open_judge

            judge = open_judge(kind, run.config.judges.get(kind))
            stack.callback(judge.close)
        if run.config.phase != "score":
            from xomni_jax.evaluation.outputs import make_outputs, model_opener

            make_outputs(run, model or model_opener(run.config), stop)
        if kind:
            judge_outputs(run, judge, stop)
    missing = run.missing() if run.writes else 0
    if missing and run.config.phase == "score" and not run.suite.judge:
        raise SuiteError(f"{run.suite.name}: {missing} of {len(run.items)} items are not answered in {run.path}; run --phase answer")
    if missing or not run.scores:
        return Results(run, None, missing)
    values = write_results(run)
    if run.config.report:
        from xomni_jax.evaluation.run_report import write_run_report

        write_run_report(run.path, {item.id: item.image for item in run.items if item.image is not None})
    return Results(run, values)


# ---- replies ----
def judge_outputs(run: SuiteRun, judge: Judge, stop: StopSignal) -> None:
    """Has this worker's items judged, a few at a time, while the next images are opened.

    Raises:
      SuiteError: images are missing (how many, and the first); the judge does not answer. What is judged is kept.
    """
    judged = run.judged()
    left = [item for item in run.mine() if item.id not in judged]
    _check_images(run, left)
    remedy = f"give the judge that was used, or delete {run.path / 'judged'} to judge everything anew"
    run.directory.claim("judged/judge.json", {"name": judge.name, "settings": judge.settings}, remedy)
    size = getattr(judge, "batch", JUDGE_BATCH)
    groups = [left[first : first + size] for first in range(0, len(left), size)]
    with run.appending("judged", "judged", len(left)) as add, ThreadPoolExecutor(1) as pool:
        following = pool.submit(_open_images, run, groups[0]) if groups else None
        for number, group in enumerate(groups):
            images = following.result()
            following = pool.submit(_open_images, run, groups[number + 1]) if number + 1 < len(groups) else None
            questions = [run.suite.questions(item) for item, opened in zip(group, images) for _ in opened]
            replies = iter(judge.ask([image for opened in images for image in opened], questions))
            made = [{"id": item.id, "replies": [next(replies) for _ in opened]} for item, opened in zip(group, images)]
            add({**record, "asked": questions_hash(run.suite, item)} for record, item in zip(made, group))
            stop.check()


def _open_images(run: SuiteRun, items: Sequence[Item]) -> list[list[Image.Image]]:
    return [run.suite.open(run.path / "images", item) for item in items]


def _check_images(run: SuiteRun, items: Sequence[Item]) -> None:
    """Before a judge is asked: do the images exist, ours or another program's in the official layout?"""
    outputs, missing = run.outputs(), []
    for item in items:
        if item.id not in outputs:
            try:
                run.suite.open(run.path / "images", item)
            except SuiteError as e:
                missing.append((item.id, e))
    if missing:
        many = f"{len(missing)} of {len(run.items)} items have no images, the first is {missing[0][0]}"
        raise SuiteError(f"{run.suite.name}: {many} ({missing[0][1]})")


# ---- results ----
def write_results(run: SuiteRun) -> dict[str, Any]:
    """Scores every selected item once, sorted by id, aggregates, and writes items.jsonl and results.json. Nothing may be missing."""
    suite = run.suite
    outputs, judged = run.outputs(), run.judged() if suite.judge else {}
    lines, records, unparsed = [], [], []
    for position, item in sorted(enumerate(run.items), key=lambda numbered: numbered[1].id):
        output = outputs.get(item.id, {})
        replies = judged[item.id]["replies"] if suite.judge else [output["answer"]]
        record = suite.score(item, replies)
        made = {"images": output.get("files", []), "replies": replies} if suite.task == "generate" else {"answer": output["answer"]}
        shown = {"id": item.id, "position": position, "prompt": item.prompt, "fields": dict(item.fields), **made}
        apart = {name: record[name] for name in ("score", "verdicts")}
        lines.append(json_line(shown | apart | {"record": {k: v for k, v in record.items() if k not in apart}}))
        records.append({**record, "id": item.id, "fields": item.fields})
        unparsed += [item.id] * bool(record["unparsed"])
    made = [outputs.get(item.id, {}) for item in run.items]
    found = suite.aggregate(records)
    settings = run.path / "settings.json"
    results = {
        "suite": suite.name,
        "title": suite.title,
        "headline": {"name": found["headline"], "value": found["scores"][found["headline"]]},
        "scores": found["scores"],
        "categories": found["categories"],
        "counts": {
            "items": len(records),
            "published": suite.published,
            "outputs": len(records) * suite.repeats,
            "unparsed": sum(record["unparsed"] for record in records),
            "overlong prompts": sum(bool(output.get("overlong")) for output in made),
            "fitted images": sum(bool(output.get("fitted")) for output in made),
        },
        "unparsed": unparsed,
        "notes": found.get("notes", []),
        "settings": run.directory.read("settings.json") if settings.exists() else None,
        "judge": run.directory.read("judged/judge.json") if suite.judge else None,
        "switches": sorted(suite.on),
        "instructions": dict(run.config.instructions),
    }
    run.directory.write("items.jsonl", "".join(lines))
    run.directory.write("results.json", pretty_json(results))
    return results
