"""The evaluation engine: takes one suite from its data to the result file.

Work is divided by item. Every process takes its share of the items, skips those that any process has finished, and appends what it
finishes to a file of its own (see `run_directory`); the process that finds nothing missing writes the results. So a run can be stopped at
any point, and its results do not depend on how the work was divided: random keys belong to an item and repeat, batch shapes are fixed,
and records are aggregated in the order of their ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xomni_jax.core.preemption import StopSignal
from xomni_jax.evaluation.comparable import SIZE, departures
from xomni_jax.evaluation.judging import judge_outputs
from xomni_jax.evaluation.results import write_results
from xomni_jax.evaluation.suite import Judge, SuiteError, is_there
from xomni_jax.evaluation.suite_run import EvalConfig, SuiteRun, open_run
from xomni_jax.evaluation.suites import GROUPS, get_suite

if TYPE_CHECKING:
    from xomni_jax.pipeline import XOmni


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
    """The suites of a group whose data lie in DATA/SUITE or DATA, into OUT/SUITE; one that fails does not keep the others from running."""
    from xomni_jax.evaluation.outputs import model_opener

    found, model = AllResults(), model_opener(config)
    for name in GROUPS[config.suite]:
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


def _finish(run: SuiteRun, model: Callable[[], XOmni] | None, judge: Judge | None, stop: StopSignal) -> Results:
    """The phases of an opened run."""
    kind = run.judge_kind if run.scores else None
    with ExitStack() as stack:
        # First of all: that no judge answers, or that it has nothing to ask, is better known before hours of drawing.
        if kind and judge is None:
            from xomni_jax.evaluation.judges import open_judge

            judge = open_judge(kind, run.config.judges.get(kind), run.config.chat)
            stack.callback(judge.close)
        if kind:
            run.suite.questions(run.items[0])
        if run.config.official:
            run = _official(run, judge if kind else None)
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

        shown = [item for item in run.items if item.image is not None and is_there(item)]
        write_run_report(run.path, {item.id: item.image for item in shown})
    return Results(run, values)


def _official(run: SuiteRun, judge: Judge | None) -> SuiteRun:
    """The run with images of the published size. Raises SuiteError if it would depart from anything else that is published."""
    inference = run.config.inference
    inference = dataclasses.replace(inference, height=inference.height or SIZE[0], width=inference.width or SIZE[1])
    asked = judge and {"name": judge.name, "settings": judge.settings}
    if found := departures(run, asked, {"height": inference.height, "width": inference.width}):
        raise SuiteError(f"{run.suite.name}: --official cannot be had: {'; '.join(found)}")
    return dataclasses.replace(run, config=dataclasses.replace(run.config, inference=inference))
