"""The judge's side of an evaluation: has outputs judged, several items at a time, and stores replies that can be scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from xomni_jax.core.preemption import StopSignal
from xomni_jax.evaluation.results import score_outputs
from xomni_jax.evaluation.suite import Item, Judge, SuiteError, is_unreadable
from xomni_jax.evaluation.suite_run import SuiteRun, questions_hash

FEW, SHARE = 10, 0.2  # so many unreadable replies, and more than this share of all, are no chance
_POLL = 0.5  # seconds between polls of the stop signal


def judge_outputs(run: SuiteRun, judge: Judge, stop: StopSignal) -> None:
    """Has this worker's items judged. An item is stored as soon as its replies are there, or at the end if some cannot be read.

    Raises:
      SuiteError: images are missing (how many, and the first); the judge does not answer; too many of its replies cannot be read.
        What is judged is kept, but for the items with unreadable replies: the same command asks about them again.
    """
    outputs, judged = run.outputs(), run.judged()
    left = [item for item in run.mine() if item.id not in judged and (run.suite.judge or item.id in outputs)]
    if run.suite.judge:
        _check_images(run, [item for item in left if item.id not in outputs])
    remedy = f"give the judge that was used, or delete {run.path / 'judged'} to judge everything anew"
    run.directory.claim("judged/judge.json", {"name": judge.name, "settings": judge.settings}, remedy)
    kept = _Kept(run)
    with run.appending("judged", "judged", len(left)) as add:
        _ask_all(run, judge, left, outputs, stop, lambda records: add(filter(kept.is_readable, records)))
        kept.check(finished=True)
        add(kept.held)


def _ask_all(
    run: SuiteRun,
    judge: Judge,
    items: Sequence[Item],
    outputs: Mapping[str, Any],
    stop: StopSignal,
    store: Callable[[Sequence[dict[str, Any]]], None],
) -> None:
    """Stores the records of items in the order in which they are ready; after an error or a stop, also those that were under way."""
    size, concurrency = getattr(judge, "batch", 1), getattr(judge, "concurrency", 1)
    # Enough items that the judge always has work, and no more: each holds its images in memory.
    replies = sum(len(questions) for questions in run.questions(items[0], outputs)) if items else 0
    calls = 1 if concurrency == 1 else 2 + concurrency // max(1, replies)
    finished: SimpleQueue[Future[list[dict[str, Any]]]] = SimpleQueue()
    with ThreadPoolExecutor(calls) as pool:
        tasks = [pool.submit(_ask, run, judge, items[first : first + size], outputs) for first in range(0, len(items), size)]
        for task in tasks:
            task.add_done_callback(finished.put)
        try:
            for _ in tasks:
                store(_next(finished, stop).result())
                stop.check()
        finally:
            for task in tasks:
                task.cancel()
            pool.shutdown()
            while not finished.empty():
                task = finished.get()
                if not task.cancelled() and not task.exception():
                    with suppress(SuiteError):  # too many unreadable replies, which was said already
                        store(task.result())


def _next(finished: SimpleQueue[Future[Any]], stop: StopSignal) -> Future[Any]:
    while True:
        try:
            return finished.get(timeout=_POLL)
        except Empty:
            stop.check_waiting()


def _ask(run: SuiteRun, judge: Judge, items: Sequence[Item], outputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records of some items: {"id", "replies", "asked"}."""
    questions = [run.questions(item, outputs) for item in items]
    images = [run.suite.open(run.path / "images", item) if run.suite.judge else [None] for item in items]
    replies = iter(judge.ask([image for opened in images for image in opened], [asked for of_item in questions for asked in of_item]))
    return [
        {"id": item.id, "replies": [next(replies) for _ in asked], "asked": questions_hash(asked)} for item, asked in zip(items, questions)
    ]


class _Kept:
    """Counts replies that cannot be read, and holds back the records that have some: they are stored only if they are few."""

    def __init__(self, run: SuiteRun):
        self.held: list[dict[str, Any]] = []
        self._run, self._items = run, {item.id: item for item in run.items}
        self._replies = self._bad = 0
        self._first = ""

    def is_readable(self, record: dict[str, Any]) -> bool:
        """Whether a record can be stored now. Raises SuiteError once too many could not be read."""
        replies = [reply for of_output in record["replies"] for reply in of_output]
        bad = sum(map(is_unreadable, replies))
        if self._run.suite.judge and not bad:
            scored = score_outputs(self._run.suite, self._items[record["id"]], record["replies"])
            # The study that asks reward services has its own limit of failures.
            bad = scored["unparsed"] if scored and self._run.suite.judge != "rewards" else 0
        self._replies, self._bad = self._replies + len(replies), self._bad + bad
        if bad:
            said = next((reply["unreadable"] for reply in replies if is_unreadable(reply)), replies[0])
            self._first = self._first or f"item {record['id']}: {str(said)[:300]}"
            self.held.append(record)
            self.check()
        return not bad

    def check(self, finished: bool = False) -> None:
        """Raises SuiteError when too many replies could not be read; `finished`: also when all could not, however few they are."""
        if self._bad >= FEW and self._bad > SHARE * self._replies or finished and 0 < self._bad == self._replies:
            raise SuiteError(
                f"{self._run.suite.name}: {self._bad} of {self._replies} replies of the judge cannot be read, the first is of "
                f"{self._first}; mend the judge or give another one, the same command goes on from there"
            )


def _check_images(run: SuiteRun, items: Sequence[Item]) -> None:
    """Raises SuiteError unless images that another program put into the directory are all there, in the official layout."""
    missing = []
    for item in items:
        try:
            run.suite.open(run.path / "images", item)
        except SuiteError as e:
            missing.append((item.id, e))
    if missing:
        many = f"{len(missing)} of {len(run.items)} items have no images, the first is {missing[0][0]}"
        raise SuiteError(f"{run.suite.name}: {many} ({missing[0][1]})")
