"""Stopping in good order."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest

from tests.miniature import ROOT
from xomni_jax.core.preemption import StopRequested, StopSignal, interruptible


class Group:
    """Counts the requests to stop; agrees on the third poll."""

    def __init__(self):
        self.requests = self.polls = 0
        self.asked = threading.Event()

    def request_stop(self):
        self.requests += 1
        self.asked.set()

    def reached_stop(self):
        self.polls += 1
        return self.polls >= 3

    def next_poll_stops(self):
        return self.polls + 1 >= 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_sets_the_flag_and_the_old_handler_comes_back(number, capfd):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        stop.check()
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        with pytest.raises(StopRequested):
            stop.check()
    assert signal.getsignal(number) is before
    assert f"{number.name}: saving at the end of this step" in capfd.readouterr().err


def test_one_of_several_processes_asks_once_and_stops_where_all_do():
    group = Group()
    with StopSignal(group) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert group.asked.wait(10)
        stop.check()
        stop.check_waiting()
        stop.check()
        with pytest.raises(StopRequested):
            stop.check_waiting()
        with pytest.raises(StopRequested):
            stop.check()
    assert group.requests == 1


def test_neither_signals_nor_the_group_keep_it_alive():
    """Stages hold its methods, and it must not hold them in turn."""
    group = Group()
    with StopSignal(group) as stop:
        alive = weakref.ref(stop)
    del stop
    gc.collect()
    assert alive() is None


def test_the_second_ctrl_c_stops_at_once():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested


def test_a_second_sigterm_is_no_reason_to_lose_the_checkpoint():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested


def test_a_wait_ends_and_the_handlers_are_restored_after_an_error():
    """What a long wait does: poll `check`; the exception passes through the context."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StopRequested):
        with StopSignal() as stop:
            for polls in range(10):
                if polls == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
                stop.check()
    assert polls == 3 and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("where", ["collected", "finalised", "dropped", "imported"])
def test_an_interrupt_that_would_be_lost_ends_the_process(where, tmp_path):
    """In each place whose exceptions Python drops, and in a module that takes them for its own."""
    (tmp_path / "careless.py").write_text("import __main__\ntry:\n    __main__.interrupted()\nexcept BaseException:\n    pass\n")
    program = f"""
import gc, os, signal, weakref
from xomni_jax.core.preemption import interruptible

def interrupted(*_):
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):
        pass

class Thing:
    def __del__(self):
        interrupted()

class Plain:
    pass

def collected():
    gc.callbacks.append(interrupted)
    gc.collect()

def finalised():
    Thing()

def dropped():
    thing = Plain()
    reference = weakref.ref(thing, interrupted)
    del thing

def imported():
    import careless

with interruptible():
    {where}()
    print("went on", flush=True)
"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_elsewhere_an_interrupt_is_raised_and_the_handler_comes_back():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        with interruptible():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


def test_other_errors_of_a_finaliser_are_reported_as_ever(capsys):
    class Thing:
        def __del__(self):
            raise ValueError("broken")

    told = []
    before, sys.unraisablehook = sys.unraisablehook, told.append
    try:
        with interruptible():
            Thing()
        assert sys.unraisablehook == told.append and [type(t.exc_value) for t in told] == [ValueError]
    finally:
        sys.unraisablehook = before


def test_a_signal_in_the_middle_of_a_write_to_stderr():
    """The progress line writes to stderr all the time; the handler must not trip over a buffered write in progress."""
    program = """
import os, signal, sys
from xomni_jax.core.preemption import StopSignal

class Slow:
    # A text stream whose write is interrupted by the signal and that refuses to be entered twice, as buffered files do.
    inside = False
    def write(self, text):
        if self.inside:
            raise RuntimeError("reentrant call")
        self.inside = True
        os.kill(os.getpid(), signal.SIGTERM)
        self.inside = False
    def flush(self):
        pass

with StopSignal() as stop:
    sys.stderr = Slow()
    sys.stderr.write("progress")
    sys.stderr = sys.__stderr__
    print("requested", stop.requested)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "requested True\n" and "SIGTERM: saving" in done.stderr, done.stderr
