"""Stopping in good order: Ctrl-C and SIGTERM set a flag that loops and long waits poll."""

from __future__ import annotations

import os
import signal
from types import FrameType


class StopRequested(Exception):
    """Raised by `StopSignal.check` inside a wait; the loop saves and leaves."""


class StepRefused(ValueError):
    """Raised by a step that cannot be made, before it changed anything; the loop saves, then lets it pass."""


class StopSignal:
    """Context manager that turns the first SIGINT or SIGTERM into a request, and the second SIGINT into KeyboardInterrupt."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
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
        self.requested = True
        # Not print: a handler may run inside a write to stderr (the progress line's), and buffered files refuse to be re-entered.
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: saving at the end of this step (Ctrl-C again stops at once, without saving)\n".encode())

    def check(self) -> None:
        """Raises StopRequested once a stop was asked for; call it inside long waits."""
        if self.requested:
            raise StopRequested
