"""The one thread that owns the devices: requests wait in lanes, enter free slots in turn, and leave when they are done or given up."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xomni_jax.core.http import Refusal
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.serving.slots import Entry, Slots


@dataclass(eq=False)
class Row:
    """One image or text that is being sampled.

    Attributes:
      job: whose it is. index: of the job's rows.
      tokens, logp: so far.
    """

    job: Job
    index: int
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)


@dataclass(eq=False)
class Job:
    """The rows of one request, which share a prompt.

    Attributes:
      lane: what rows must have in common to run in one batch: model, size, whether they are guided.
      make_slots: makes the slots of the lane, where there are none.
      ids_S, negative_S: the prompt, and the one that guidance steers away from.
      keys: data of a PRNG key per row. sampling: how its tokens are chosen.
      length: tokens of a row. stop: the token that ends it before; -1: none does.
      advanced: told after every segment of a row and whether it is complete; runs in the scheduler's thread.
      failed: told (status, sentence) once when the job ends without its rows.
      deadline: `time.monotonic()` at which it is given up.
      plans: of each row, for its `Entry`; (): none has any.
      cancelled: set by whoever does not want it any more.
    """

    lane: Hashable
    make_slots: Callable[[], Slots]
    ids_S: np.ndarray
    negative_S: np.ndarray | None
    keys: np.ndarray
    sampling: SamplingConfig
    length: int
    stop: int
    advanced: Callable[[Row, bool], None]
    failed: Callable[[int, str], None]
    deadline: float
    plans: Sequence[Mapping[str, np.ndarray]] = ()
    cancelled: bool = False
    begun: int = 0

    @property
    def count(self) -> int:
        """Its rows."""
        return len(self.keys)


class _Lane:
    def __init__(self) -> None:
        self.slots: Slots | None = None
        self.waiting: deque[Job] = deque()
        self.rows: list[Row | None] = []

    @property
    def busy(self) -> bool:
        return bool(self.waiting) or any(self.rows)


class Scheduler:
    """Runs jobs on the devices until it is closed.

    Args:
      max_queue: rows that may wait for a slot; a job beyond it is refused.
      max_lanes: lanes whose slots exist at a time, which bounds the memory; an idle one makes room.
      after: called by the thread after every round of segments, for work that whole rounds share, such as decoding pixels.

    Attributes:
      rows_done, tokens, seconds_busy: what it has done, for metrics.
    """

    def __init__(self, max_queue: int, max_lanes: int, after: Callable[[], None] = lambda: None):
        self._max_queue, self._max_lanes, self._after = max_queue, max_lanes, after
        self._lanes: OrderedDict[Hashable, _Lane] = OrderedDict()  # the one that made its slots last at the end
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._waiting, self._lock, self._closed = 0, threading.Lock(), False
        self.rows_done = self.tokens = 0
        self.seconds_busy = 0.0
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    # ---- called by any thread ----
    @property
    def waiting(self) -> int:
        """Rows that have no slot yet."""
        return self._waiting

    @property
    def running(self) -> int:
        """Rows in slots."""
        return sum(row is not None for lane in list(self._lanes.values()) for row in lane.rows)

    def retry_after(self) -> int:
        """Seconds until the queue is probably empty, 1 to 60."""
        each = self.seconds_busy / self.rows_done if self.rows_done else 1.0
        return int(min(max(np.ceil(self._waiting * each), 1), 60))

    def submit(self, job: Job) -> None:
        """Queues a job. Refusal (429) when too many rows wait."""
        with self._lock:
            if self._waiting and self._waiting + job.count > self._max_queue:
                raise Refusal(429, f"{self._waiting} images or answers wait already; try again", self.retry_after())
            self._waiting += job.count
        self._inbox.put(job)

    def call(self, fn: Callable[[], Any]) -> Future:
        """Runs a function in the thread, between segments. Refusal (429) when too many wait."""
        if self._inbox.qsize() > self._max_queue:
            raise Refusal(429, "too many requests wait already; try again", self.retry_after())
        future: Future = Future()
        self._inbox.put((future, fn))
        return future

    def close(self) -> None:
        """Ends the thread after the segment under way; jobs that are not complete fail."""
        self._closed = True
        self._inbox.put(None)
        self._thread.join()

    # ---- the thread ----
    def _run(self) -> None:
        while not self._closed:
            idle = not any(lane.busy for lane in self._lanes.values())
            self._take(block=idle)
            began = time.monotonic()
            for key, lane in list(self._lanes.items()):
                if lane.busy:
                    self._guarded(key, lane)
            self._after()
            self.seconds_busy += time.monotonic() - began
        self._take(block=False)
        for lane in self._lanes.values():
            self._fail(lane, 503, "the service is stopping; ask another one, or later")

    def _take(self, block: bool) -> None:
        """What has arrived: jobs go to their lanes, one function is called."""
        while True:
            try:
                arrived = self._inbox.get(block)
            except queue.Empty:
                return
            block = False
            if isinstance(arrived, Job):
                self._lanes.setdefault(arrived.lane, _Lane()).waiting.append(arrived)
            elif arrived is not None:
                future, fn = arrived
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(fn())
                    except BaseException as error:  # noqa: BLE001 - it belongs to the caller
                        future.set_exception(error)
                return

    def _guarded(self, key: Hashable, lane: _Lane) -> None:
        try:
            self._step(key, lane)
        except Exception as error:  # noqa: BLE001 - such as no memory: this lane starts anew, the others go on
            print(f"xomni serve: {key}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            self._fail(lane, 500, "the model could not run this request; the service's log says why")
            del self._lanes[key]

    def _step(self, key: Hashable, lane: _Lane) -> None:
        """A segment of one lane."""
        now = time.monotonic()
        for job in [j for j in lane.waiting if self._over(j, now)]:
            lane.waiting.remove(job)
            self._count(job.begun - job.count)
        lane.rows = [None if row is None or self._over(row.job, now) else row for row in lane.rows]
        if not lane.busy or not self._has_slots(key, lane):
            return
        self._fill(lane)
        out = lane.slots.advance(1 + max(slot for slot, row in enumerate(lane.rows) if row))
        for slot, row in enumerate(lane.rows):
            if row is None:
                continue
            job, tokens = row.job, out["tokens"][slot].tolist()[: row.job.length - len(row.tokens)]
            if job.stop in tokens:
                tokens = tokens[: tokens.index(job.stop) + 1]
            row.tokens += tokens
            row.logp += out["logp"][slot].tolist()[: len(tokens)]
            self.tokens += len(tokens)
            complete = len(row.tokens) == job.length or row.tokens[-1] == job.stop
            if complete:
                lane.rows[slot] = None
                self.rows_done += 1
            job.advanced(row, complete)

    def _over(self, job: Job, now: float) -> bool:
        """Whether a job is not to go on; told once."""
        if not job.cancelled and now > job.deadline:
            job.cancelled = True
            job.failed(504, "the request was not done in time; ask for fewer images, or again later")
        return job.cancelled

    def _has_slots(self, key: Hashable, lane: _Lane) -> bool:
        """Makes the slots of a lane where there is room; the lane that made its own first, and is idle, makes room."""
        if lane.slots is None:
            made = [k for k, other in self._lanes.items() if other.slots is not None]
            if len(made) >= self._max_lanes:
                idle = next((k for k in made if not self._lanes[k].busy), None)
                if idle is None:
                    return False
                del self._lanes[idle]
            lane.slots = lane.waiting[0].make_slots()
            lane.rows = [None] * lane.slots.count
            self._lanes.move_to_end(key)
        return True

    def _fill(self, lane: _Lane) -> None:
        """Gives free slots to the waiting jobs in turn, a row each."""
        entering = []
        for slot in (slot for slot, row in enumerate(lane.rows) if row is None):
            if not lane.waiting:
                break
            job = lane.waiting.popleft()
            lane.rows[slot] = Row(job, job.begun)
            plan = job.plans[job.begun] if job.plans else {}
            entering.append(Entry(slot, job.ids_S, job.negative_S, job.keys[job.begun], job.sampling, plan))
            job.begun += 1
            self._count(-1)
            if job.begun < job.count:
                lane.waiting.append(job)
        lane.slots.enter(entering)

    def _fail(self, lane: _Lane, status: int, sentence: str) -> None:
        for job in {*lane.waiting, *(row.job for row in lane.rows if row is not None)}:
            self._count(job.begun - job.count)
            if not job.cancelled:
                job.cancelled = True
                job.failed(status, sentence)
        lane.waiting.clear()
        lane.rows = []

    def _count(self, rows: int) -> None:
        with self._lock:
            self._waiting += rows
