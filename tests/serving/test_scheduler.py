"""The order of rows, bounds, deadlines and failures, on slots that count instead of computing."""

import threading
import time

import numpy as np
import pytest

from xomni_jax.core.http import Refusal
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.serving.scheduler import Job, Scheduler


class Counting:
    """Two slots; a row's tokens are its key, then one more each; a gate lets segments through."""

    count = 2

    def __init__(self, gate=None, error=None):
        self.gate, self.error, self.now, self.entered, self.used = gate, error, np.zeros(2, int), [], []

    def enter(self, entries):
        self.entered += [int(e.ids_S[0]) for e in entries]
        for e in entries:
            self.now[e.slot] = e.key

    def advance(self, used):
        self.used.append(used)
        if self.gate:
            self.gate.acquire()
        if self.error:
            raise self.error
        out = self.now[:, None] + np.arange(2)
        self.now += 2
        return {"tokens": out, "logp": out * 0.0}


@pytest.fixture
def scheduler():
    made = Scheduler(max_queue=4, max_lanes=2)
    yield made
    made.close()


class Told:
    """What a job was told."""

    def __init__(self, slots, keys, lane="a", length=4, stop=-1, deadline=1e9, name=0):
        self.done, self.rows, self.error = threading.Event(), {}, None
        self.order = []
        prompt = np.array([name]), None, np.array(keys), SamplingConfig()
        self.job = Job(lane, lambda: slots, *prompt, length, stop, self.advanced, self.failed, deadline)

    def advanced(self, row, complete):
        self.order.append((row.index, len(row.tokens)))
        if complete:
            self.rows[row.index] = row.tokens
        if len(self.rows) == self.job.count:
            self.done.set()

    def failed(self, status, sentence):
        self.error = status, sentence
        self.done.set()


def test_rows_end_at_their_length_or_stop(scheduler):
    slots = Counting()
    told = [Told(slots, [10, 20, 30]), Told(slots, [7], stop=9, name=1)]
    for one in told:
        scheduler.submit(one.job)
    assert all(one.done.wait(10) for one in told)
    assert told[0].rows == {0: [10, 11, 12, 13], 1: [20, 21, 22, 23], 2: [30, 31, 32, 33]}
    assert told[1].rows == {0: [7, 8, 9]} and (scheduler.waiting, scheduler.running) == (0, 0)


def test_waiting_jobs_take_turns_and_the_queue_is_bounded(scheduler):
    gate = threading.Semaphore(0)
    slots = Counting(gate)
    big, small = Told(slots, [10, 20, 30, 40]), Told(slots, [50], name=1)
    scheduler.submit(big.job)  # an empty queue takes what exceeds it alone
    while scheduler.waiting > 2:
        time.sleep(0.001)
    scheduler.submit(small.job)
    with pytest.raises(Refusal) as refused:
        scheduler.submit(Told(slots, [60, 70]).job)
    assert refused.value.args[0] == 429 and refused.value.args[2] >= 1
    for _ in range(8):
        gate.release()
    assert big.done.wait(10) and small.done.wait(10)
    assert slots.entered == [0, 0, 0, 1, 0]  # the small one shares the second round


def test_what_is_cancelled_or_late_frees_its_slot(scheduler):
    gate = threading.Semaphore(0)
    slots = Counting(gate)
    long, late, next_ = Told(slots, [1, 2], length=100), Told(slots, [3], deadline=0), Told(slots, [9])
    for one in (long, late, next_):
        scheduler.submit(one.job)
    gate.release()
    while not long.order:
        time.sleep(0.001)
    long.job.cancelled = True
    for _ in range(4):
        gate.release()
    assert next_.done.wait(10) and next_.rows == {0: [9, 10, 11, 12]}
    assert late.error[0] == 504 and long.error is None and len(long.order) <= 4


def test_a_lane_that_fails_takes_nothing_else_along(scheduler, capsys):
    bad, good = Told(Counting(error=MemoryError("no room")), [1]), Told(Counting(), [2], lane="b")
    scheduler.submit(bad.job)
    scheduler.submit(good.job)
    assert bad.done.wait(10) and good.done.wait(10)
    assert bad.error[0] == 500 and good.rows and "MemoryError: no room" in capsys.readouterr().err
    again = Told(Counting(), [1])
    scheduler.submit(again.job)
    assert again.done.wait(10) and again.rows and scheduler.waiting == 0


def test_idle_lanes_make_room(scheduler):
    for n in range(4):
        slots = Counting()
        told = Told(slots, [n], lane=n)
        scheduler.submit(told.job)
        assert told.done.wait(10) and slots.used == [1, 1]  # of two slots
    assert len(scheduler._lanes) == 2


def test_functions_run_between_segments_and_closing_fails_what_is_left():
    scheduler, gate = Scheduler(4, 2), threading.Semaphore(0)
    told = Told(Counting(gate), [1], length=100)
    scheduler.submit(told.job)
    result = scheduler.call(lambda: threading.current_thread().name)
    gate.release()
    gate.release()
    assert result.result(10) == "scheduler"
    with pytest.raises(ZeroDivisionError):
        error = scheduler.call(lambda: 1 / 0)
        gate.release()
        gate.release()
        error.result(10)
    for _ in range(50):
        gate.release()
    scheduler.close()
    assert told.error is None or told.error[0] == 503
