"""Stopping in good order: Ctrl-C and SIGTERM set a flag that loops and long waits poll; several processes stop after the same poll."""

from __future__ import annotations

import os
import signal
from types import FrameType

from xomni_jax.core.process_group import Line


class StopRequested(Exception):
    """Raised by `StopSignal.check` inside a wait; the loop saves and leaves."""


class StepRefused(ValueError):
    """Raised by a step that cannot be made, before it changed anything; the loop saves, then lets it pass."""


class StopSignal:
    """Context manager that turns the first SIGINT or SIGTERM into a request, and the second SIGINT into KeyboardInterrupt."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, line: Line | None = None) -> None:
        """`line` joins this process to the others of its run: what one is told, all do."""
        self.requested = False
        self._line = line
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        if self._line is not None:
            self._line.wanted = lambda: self.requested
        self._before = {s: signal.signal(s, self._receive) for s in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        if self._line is not None:
            self._line.finish()
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        # Not print: a handler may run inside a write to stderr (the progress line's), and buffered files refuse to be re-entered.
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: saving at the end of this step (Ctrl-C again stops at once, without saving)\n".encode())

    def reached(self) -> bool:
        """Whether to stop here. Every process must call this, or `check`, at the same places: they agree on one of these calls."""
        return self.requested if self._line is None else self._line.reached()

    def check(self) -> None:
        """Raises StopRequested where `reached`; call it between the pieces of long work."""
        if self.reached():
            raise StopRequested

    def check_waiting(self) -> None:
        """Raises StopRequested if the next `check` will; inside waits, which take as many rounds as they take."""
        if self.requested if self._line is None else self._line.next_stops():
            raise StopRequested
