"""Orderly stops: Ctrl-C and SIGTERM set a flag that loops and long waits poll; several processes stop at the same poll."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from xomni_jax.core.process_group import ProcessGroup


class StopRequested(Exception):
    """Raised by `StopSignal.check` inside a wait; the loop saves and returns."""


class StepRefused(ValueError):
    """Raised by a step that cannot go on, before it has changed anything; the loop saves, then raises it again."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Context in which Ctrl-C always arrives, as KeyboardInterrupt.

    Python drops an exception that is raised in a finaliser or in a callback of the garbage collector, of which JAX has one, and the
    program goes on. An interrupt that was dropped is raised again shortly after.
    """
    before = sys.unraisablehook

    def again() -> None:
        time.sleep(0.05)  # until the callback has returned
        _thread.interrupt_main()

    def dropped(what: Any) -> None:
        if issubclass(what.exc_type, KeyboardInterrupt):
            _thread.start_new_thread(again, ())
        else:
            before(what)

    sys.unraisablehook = dropped
    try:
        yield
    finally:
        sys.unraisablehook = before


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
            raise KeyboardInterrupt
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
