"""The line between the processes of a run: one TCP connection from each to process 0, beside what JAX sends over its own.

JAX ends a process that cannot reach the others with a stack trace, and one whose neighbour died hangs until a heartbeat runs out. The line
knows better: who has arrived and with what configuration, who has gone, and after which of its polls every process stops.

Messages are JSON, one a line. Process 0 runs the hub and is a member like the others.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

NEVER = 2**53  # a poll that is not reached: the answer of a process whose training is over
GRACE = 5.0  # seconds in which a process may tell its own error after another's
LOST = 1  # exit code of a process that ends because another one did


class LineError(ValueError):
    """The processes of a run do not come together; one sentence with who, where and what to do."""


def split_address(address: str) -> tuple[str, int]:
    """ "host:port" -> (host, port). Raises LineError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65535:
        raise LineError(f"the coordinator's address {address!r} is none; write host:port, such as 10.0.0.2:8476")
    return host.strip("[]"), int(port)


class Line:
    """This process's end of the line, from the roll call to `close`.

    Args:
      address: "host:port" of the hub. index, count: of this process and of all.
      facts: what must be the same everywhere, {"config.seed": 0, ...}; JSON values.
      deadline: seconds until everybody must have arrived.

    Raises:
      LineError: process 0 does not answer, somebody did not come, or somebody's facts differ.
    """

    def __init__(self, address: str, index: int, count: int, facts: Mapping[str, Any], deadline: float):
        self.index, self.count = index, count
        self._hub = Hub(address, count, deadline) if index == 0 else None
        self._socket = connect(address, index, deadline)
        self._lines = self._socket.makefile("r")
        self._writing = threading.Lock()
        self._send({"hello": index, "facts": dict(facts)})
        # The hub's own deadline comes first: it knows who is missing.
        self._socket.settimeout(deadline + 10)
        try:
            answer = json.loads(self._lines.readline() or "{}")
        except (OSError, ValueError):  # ValueError: whoever answers there is none of ours
            answer = {}
        if not answer.get("go"):
            ended = f"process 0 at {address} ended before everybody had arrived; its output says why. Without any, something else answers at that address"
            raise LineError(answer.get("refused") or ended)
        self._socket.settimeout(None)
        self._polls = 0
        self._target: int | None = None
        self._polling = threading.Lock()
        self._asked = self._over = False
        self.wanted: Callable[[], bool] = lambda: False  # whether this process was told to stop
        threading.Thread(target=self._listen, name="line", daemon=True).start()
        threading.Thread(target=self._watch, name="line-watch", daemon=True).start()

    # ---- stopping together ----
    def reached(self) -> bool:
        """Counts a poll, which every process makes at the same places; True from the one on that all have agreed to stop at."""
        with self._polling:
            self._polls += 1
            return self._target is not None and self._polls >= self._target

    def next_stops(self) -> bool:
        """Whether the next poll is where all stop: what this process waits for meanwhile is not needed any more."""
        return self._target is not None and self._polls + 1 >= self._target

    def finish(self) -> None:
        """No more polls: the others run to the end as well."""
        with self._polling:
            self._polls = NEVER

    # ---- leaving ----
    def fail(self, why: str) -> None:
        """Tells the others that this process ends with an error, so that they do not wait for it. Process 0 lets them end first."""
        self._over = True
        try:
            self._send({"failed": why})
        except OSError:
            return
        if self._hub is not None:
            self._hub.outlast(GRACE + 2)

    def close(self) -> None:
        """Leaves in good order."""
        self._over = True
        try:
            self._send({"bye": True})
        except OSError:
            pass

    # ---- threads ----
    def _send(self, message: Mapping[str, Any]) -> None:
        with self._writing:
            self._socket.sendall((json.dumps(message) + "\n").encode())

    def _watch(self) -> None:
        """Asks for a stop once this process was told to: a signal handler must not touch the connection itself."""
        while not self._over and not self._asked:
            if self.wanted():
                self._asked = True
                self._send({"ask": True})
            time.sleep(0.1)

    def _listen(self) -> None:
        try:
            for line in self._lines:
                message = json.loads(line)
                if "where" in message:
                    # Held until the answer is there: a poll made in between could pass the agreed one.
                    self._polling.acquire()
                    self._send({"at": self._polls})
                elif "stop" in message:
                    self._target = message["stop"]
                    self._polling.release()
                elif "gone" in message:
                    self._end(message["gone"])
        except (OSError, ValueError):
            pass
        self._end("process 0 is gone")

    def _end(self, why: str) -> None:
        """Ends this process for another's sake, unless it is ending by itself."""
        if self._over:
            return
        time.sleep(GRACE if "stopped:" in why else 0.0)
        if self._over:
            return
        # On a line of its own, below the progress line.
        print(
            f"\nxomni: {why}; process {self.index} ends too. The same command goes on from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        if self._hub is not None:
            self._hub.outlast(2.0)
        leave(LOST)


def leave(code: int) -> None:
    """Ends the process at once: an orderly exit would wait minutes for processes that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def connect(address: str, index: int, deadline: float) -> socket.socket:
    """A connection to the hub, tried until the deadline."""
    end = time.monotonic() + deadline
    while True:
        try:
            return socket.create_connection(split_address(address), timeout=min(5.0, deadline))
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > end:
            raise LineError(
                f"process {index} cannot reach process 0 at {address} within {deadline:g} s ({reason}); start all processes, and see that "
                "this address is process 0's and its port is open"
            )
        time.sleep(0.2)


class Hub:
    """Process 0's side: calls the roll, compares facts, agrees on stops and spreads the news of who has gone."""

    def __init__(self, address: str, count: int, deadline: float):
        self.count, self.deadline = count, deadline
        host, port = split_address(address)
        try:
            self._server = socket.create_server(("", port), family=socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET,
                                                dualstack_ipv6=socket.has_dualstack_ipv6())  # fmt: skip
        except OSError as error:
            raise LineError(
                f"process 0 cannot listen on port {port} ({error.strerror}); end what uses it, or give another address"
            ) from None
        self._members: dict[int, socket.socket] = {}
        self._at: dict[int, int] = {}
        self._asked = self._agreed = False
        self._left, self._lock = set(), threading.Lock()
        threading.Thread(target=self._roll_call, name="hub", daemon=True).start()

    def outlast(self, seconds: float) -> None:
        """Waits for the others to leave. JAX's service is in this process: whoever is there when it closes is ended with a stack trace."""
        end = time.monotonic() + seconds
        while not self._left.issuperset(range(1, self.count)) and time.monotonic() < end:
            time.sleep(0.05)

    def _roll_call(self) -> None:
        facts, end = {}, time.monotonic() + self.deadline
        files, twice = {}, None
        while len(facts) < self.count and time.monotonic() < end:
            self._server.settimeout(max(end - time.monotonic(), 0.01))
            try:
                member, _ = self._server.accept()
                member.settimeout(10)
                lines = member.makefile("r")
                hello = json.loads(lines.readline())
                index, said = int(hello["hello"]), hello["facts"]
            except (OSError, ValueError, KeyError):
                continue  # nobody of ours, or the deadline
            if index in facts:
                twice = index
            member.settimeout(None)
            self._members[index], facts[index], files[index] = member, said, lines
        self._server.close()
        why = missing(facts, self.count, self.deadline) or different(facts)
        if twice is not None:
            why = f"two processes call themselves {twice}; number them from 0 to {self.count - 1}"
        for index in sorted(files, reverse=True):  # process 0 last: once refused it ends, and the hub with it
            self._tell(index, {"refused": why} if why else {"go": True})
        if not why:
            for index, lines in files.items():
                threading.Thread(target=self._serve, args=(index, lines), daemon=True).start()

    def _serve(self, index: int, lines: Any) -> None:
        """Hears one member until it leaves."""
        try:
            for line in lines:
                message = json.loads(line)
                if "ask" in message:
                    self._ask()
                elif "at" in message:
                    self._answer(index, message["at"])
                elif "failed" in message:
                    self._left.add(index)
                    self._tell_all({"gone": f"process {index} stopped: {message['failed']}"})
                elif "bye" in message:
                    self._left.add(index)
                    self._answer(index, NEVER)
        except (OSError, ValueError):
            pass
        if index not in self._left:
            self._left.add(index)
            self._tell_all({"gone": f"process {index} is gone"})

    def _ask(self) -> None:
        with self._lock:
            first, self._asked = not self._asked, True
        if first:
            self._tell_all({"where": True})

    def _answer(self, index: int, polls: int) -> None:
        with self._lock:
            self._at[index] = polls
            due = self._asked and not self._agreed and len(self._at) == self.count
            self._agreed |= due
        if due:
            self._tell_all({"stop": max(self._at.values()) + 1})

    def _tell_all(self, message: Mapping[str, Any]) -> None:
        for index in sorted(self._members):
            if index not in self._left:
                self._tell(index, message)

    def _tell(self, index: int, message: Mapping[str, Any]) -> None:
        try:
            self._members[index].sendall((json.dumps(message) + "\n").encode())
        except OSError:
            pass  # its own thread finds that it has gone


def missing(facts: Mapping[int, Any], count: int, deadline: float) -> str | None:
    """Who did not come, in a sentence."""
    absent = [i for i in range(count) if i not in facts]
    if not absent:
        return None
    came = ", ".join(map(str, sorted(facts))) or "none"
    return f"{len(facts)} of {count} processes arrived within {deadline:g} s ({came}); missing: {', '.join(map(str, absent))}. Start the same command on every host"


def different(facts: Mapping[int, Mapping[str, Any]]) -> str | None:
    """The first process whose facts are not those of process 0, and where they differ, in a sentence."""
    for index in sorted(facts):
        for key in sorted(set(facts[0]) | set(facts[index])):
            ours, theirs = facts[0].get(key), facts[index].get(key)
            if ours != theirs:
                return f"process {index} was started with {key}={theirs!r}, process 0 with {ours!r}; start the same command on every host"
    return None
