"""Orderly stops: Ctrl-C and SIGTERM set a flag that loops and long waits poll; several processes stop at the same poll."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from xomni_jax.core.process_group import ProcessGroup


class StopRequested(Exception):
    """Raised by `StopSignal.check` inside a wait; the loop saves and returns."""


class StepRefused(ValueError):
    """Raised by a step that cannot go on, before it has changed anything; the loop saves, then raises it again."""


class Outage(StepRefused):
    """Something outside the run does not answer, for longer than the run may wait: the same command goes on when it answers again.

    Attributes:
      exit_code: of the command; launchers take it for that of a run that was stopped and has saved, and start it again.
    """

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


def interrupt(number: int, frame: FrameType | None) -> None:
    """A handler of Ctrl-C: raises KeyboardInterrupt, but ends the process where that would be lost.

    An exception in the middle of an import may be dropped by the module that is imported, or crash it: extensions do not expect one.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            end_now()
        frame = frame.f_back
    raise KeyboardInterrupt


def end_now() -> None:
    """Ends the process as an interrupted one. Neither print nor an orderly exit: a handler may interrupt code that holds their locks."""
    os.write(2, b"interrupted\n")
    os._exit(128 + signal.SIGINT)


@contextmanager
def interruptible() -> Iterator[None]:
    """Context in which Ctrl-C is never lost.

    Python drops an exception that is raised in a finaliser or in a callback of the garbage collector, of which JAX has one, and the
    program would go on.
    """

    def dropped(what: Any) -> None:
        if issubclass(what.exc_type, KeyboardInterrupt):
            end_now()
        hook(what)

    hook, sys.unraisablehook = sys.unraisablehook, dropped
    # Not in another thread, nor where a shell has started the program with interrupts ignored.
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


class StopSignal:
    """Context manager that turns the first SIGINT or SIGTERM into a request to stop, and the second SIGINT into KeyboardInterrupt.

    Args:
      group: the processes of the run. A request to one of them stops all of them.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.requested = False
        self._group = group
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        self._before = {s: signal.signal(s, self._receive) for s in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            interrupt(number, frame)
        # Neither print nor threading: a handler may interrupt code that holds their locks, such as the progress line's write to stderr.
        if self._group is not None and not self.requested:
            _thread.start_new_thread(self._group.request_stop, ())
        self.requested = True
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: saving at the end of this step (Ctrl-C again stops at once, without saving)\n".encode())

    def reached(self) -> bool:
        """Whether to stop here. Every process must call this, or `check`, at the same places: they agree on one of these calls."""
        return self.requested if self._group is None else self._group.reached_stop()

    def check(self) -> None:
        """Raises StopRequested if this is the place to stop; call it between the pieces of long work."""
        if self.reached():
            raise StopRequested

    def check_waiting(self) -> None:
        """Raises StopRequested if the next `check` will. Call it inside waits, as often as you like."""
        if self.requested if self._group is None else self._group.next_poll_stops():
            raise StopRequested
