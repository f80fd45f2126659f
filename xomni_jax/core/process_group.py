"""The processes of a run: whether all have joined and were started alike, when they stop, and which one has ended.

Every process keeps one TCP connection to process 0 besides those of JAX, which lack four things: JAX aborts, without a name, when a
process does not join; when one dies or falls silent later it hangs, then aborts; it does not compare how processes were started; and
`multihost_utils.reached_preemption_sync_point` reacts to SIGTERM only and cannot end a wait inside a step.
Messages are JSON objects, one per line.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

NEVER = 2**53  # the number of a poll that no process reaches
PULSE = 10.0  # seconds between two signs of life of a process
SILENCE = 60.0  # seconds without one after which a process counts as lost; it may hang or be stopped, with its connections open
GRACE = 5.0  # seconds for a process to report an error of its own after another process has failed
LOST_PEER = 1  # exit code of a process that ends because another one did


class ProcessGroupError(ValueError):
    """The processes of a run cannot work together. One sentence: which process, why, and what to do."""


class ProcessGroup:
    """All processes of a run, seen from one of them. The constructor returns when all have joined.

    To stop together, the processes poll with `reached_stop` wherever they could stop; each makes the same polls in the same order.

    Args:
      address: "host:port" at which process 0 listens.
      index, count: number of this process, and how many there are.
      settings: what every process must have been started with, {"config.seed": 0, ...}; JSON values.
      timeout: seconds until all must have joined.

    Raises:
      ProcessGroupError: process 0 cannot be reached, a process did not join, or two processes have different settings.
    """

    def __init__(self, address: str, index: int, count: int, settings: Mapping[str, Any], timeout: float):
        self.index, self.count = index, count
        self._polls, self._stop_at, self._leaving = 0, NEVER, False
        self._poll_lock = threading.Lock()
        self._server = Server(address, count, timeout) if index == 0 else None
        self._connection = connect(address, index, timeout)
        self._connection.settimeout(timeout + 10)  # longer than the server waits: it knows who is missing
        messages = receive(self._connection)
        send(self._connection, join=index, settings=settings)
        ended = f"process 0 at {address} ended before all had joined, and its output says why; or something else answers at that address"
        if refusal := next(messages, {}).get("refusal", ended):
            raise ProcessGroupError(refusal)
        self._connection.settimeout(SILENCE)
        threading.Thread(target=self._listen, args=(messages,), daemon=True).start()
        threading.Thread(target=self._pulse, daemon=True).start()

    def request_stop(self) -> None:
        """Asks all processes to stop at the first poll that none of them has made yet."""
        send(self._connection, stop=True)

    def reached_stop(self) -> bool:
        """Makes a poll; True from the agreed one on."""
        with self._poll_lock:
            self._polls += 1
        return self._polls >= self._stop_at

    def next_poll_stops(self) -> bool:
        """Whether the next poll is the agreed one, so that whatever this process waits for is no longer needed."""
        return self._polls + 1 >= self._stop_at

    def leave(self, error: str | None = None) -> None:
        """Leaves the group; with an error the other processes end as well, before process 0 does."""
        self._leaving = True
        send(self._connection, leave=error)
        if error is not None and self._server is not None:
            self._server.outlast_others(GRACE + 2)

    def _pulse(self) -> None:
        """Sends signs of life, which process 0 answers."""
        while not self._leaving:
            send(self._connection, alive=True)
            time.sleep(PULSE)

    def _listen(self, messages: Iterator[dict[str, Any]]) -> None:
        """Answers the server, and ends this process when another one has ended."""
        ended, heard = None, time.monotonic()
        for message in messages:
            heard = time.monotonic()
            if "alive" in message:
                continue
            if "report" in message:
                self._poll_lock.acquire()  # until "stop_at" arrives: a poll made in between could pass the agreed one
                send(self._connection, polls=self._polls)
            elif "stop_at" in message:
                self._stop_at = message["stop_at"]
                self._poll_lock.release()
            else:
                ended = message
                break
        ended = ended or lost(0, heard)
        time.sleep(ended["grace"])
        if self._leaving:
            return
        resume = "The same command resumes from the newest checkpoint"
        # On a line of its own, below the progress line.
        print(f"\nxomni: {ended['ended']}; process {self.index} ends too. {resume}", file=sys.stderr, flush=True)
        if self._server is not None:
            self._server.outlast_others(2.0)
        exit_now(LOST_PEER)


class Server:
    """Process 0's side: admits the processes, finds the poll that all can stop at, and announces which process has ended."""

    def __init__(self, address: str, count: int, timeout: float):
        port, ipv6 = split_address(address)[1], socket.has_dualstack_ipv6()
        try:
            listener = socket.create_server(("", port), family=socket.AF_INET6 if ipv6 else socket.AF_INET, dualstack_ipv6=ipv6)
        except OSError as e:
            reason = f"process 0 cannot listen on port {port} ({e.strerror})"
            raise ProcessGroupError(f"{reason}; end the program that uses it, or choose another address") from None
        self._count = count
        self._members: dict[int, socket.socket] = {}
        self._polls: dict[int, int] = {}
        self._stopping = self._agreed = False
        self._lock = threading.Lock()
        threading.Thread(target=self._admit, args=(listener, timeout), daemon=True).start()

    def outlast_others(self, timeout: float) -> None:
        """Waits until the others have left: when JAX's service in process 0 closes, it aborts them with a stack trace."""
        end = time.monotonic() + timeout
        while self._members.keys() - {0} and time.monotonic() < end:
            time.sleep(0.05)

    def _admit(self, listener: socket.socket, timeout: float) -> None:
        """Waits until all have joined, then admits or refuses all."""
        settings, messages, refusal = {}, {}, None
        end = time.monotonic() + timeout
        while len(settings) < self._count and (left := end - time.monotonic()) > 0:
            listener.settimeout(left)
            try:
                connection, _ = listener.accept()
                connection.settimeout(10)
                incoming = receive(connection)
                joining = next(incoming)
                index = joining["join"]
            except (OSError, StopIteration, KeyError):
                continue  # the timeout, or not a process of this run
            connection.settimeout(SILENCE)
            if index in settings:
                refusal = f"two processes have the index {index}; number them from 0 to {self._count - 1}"
            self._members[index], settings[index], messages[index] = connection, joining["settings"], incoming
        listener.close()  # what starts later belongs to the next run
        refusal = refusal or why_refused(settings, self._count, timeout)
        for index in sorted(self._members, reverse=True):  # process 0 last: if refused it ends, and the server with it
            send(self._members[index], refusal=refusal)
        for index, incoming in {} if refusal else messages.items():
            threading.Thread(target=self._serve, args=(index, incoming), daemon=True).start()

    def _serve(self, index: int, messages: Iterator[dict[str, Any]]) -> None:
        """Handles the messages of one process until it leaves or is gone."""
        left, ended, heard = False, None, time.monotonic()
        for message in messages:
            heard = time.monotonic()
            with self._lock:
                if "alive" in message:
                    send(self._members[index], alive=True)
                elif "polls" in message:
                    self._polls[index] = message["polls"]
                elif "stop" in message and not self._stopping:
                    self._stopping = True
                    self._send_all(report=True)
                elif "leave" in message:
                    error, left = message["leave"], True
                    ended = error and {"ended": f"process {index} stopped: {error}", "grace": GRACE}
                    break
                self._agree()
        if not left:
            ended = lost(index, heard)
        with self._lock:
            del self._members[index]
            self._polls[index] = NEVER  # it has made its last poll without stopping, so nobody may stop any more
            if ended:
                self._send_all(**ended)
            self._agree()

    def _agree(self) -> None:
        if self._stopping and not self._agreed and len(self._polls) == self._count:
            self._agreed = True
            self._send_all(stop_at=max(self._polls.values()) + 1)

    def _send_all(self, **message: Any) -> None:
        for connection in self._members.values():
            send(connection, **message)


def lost(index: int, heard: float) -> dict[str, Any]:
    """The message about a process that ended without leaving, last heard at a monotonic time."""
    silent = time.monotonic() - heard
    how = "is gone" if silent < SILENCE else f"has not answered for {silent:.0f} s: it hangs, is stopped or cut off"
    return {"ended": f"process {index} {how}", "grace": 0.0}


def why_refused(settings: Mapping[int, Mapping[str, Any]], count: int, timeout: float) -> str | None:
    """One sentence: which processes are missing, or which one was started differently. None if there is nothing to say."""
    if missing := [i for i in range(count) if i not in settings]:
        joined, missing = (", ".join(map(str, indices)) for indices in (sorted(settings), missing))
        counts = f"{len(settings)} of {count} processes joined within {timeout:g} s ({joined or 'none'})"
        return f"{counts}; missing: {missing}. Start the same command on every host"
    for index in range(1, count):
        for key in sorted(settings[0].keys() | settings[index].keys()):
            first, other = settings[0].get(key), settings[index].get(key)
            if first != other:
                return f"process {index} was started with {key}={other!r}, process 0 with {first!r}; start the same command on every host"
    return None


def split_address(address: str) -> tuple[str, int]:
    """ "host:port" -> (host, port). Raises ProcessGroupError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65535:
        raise ProcessGroupError(f"{address!r} is not the address of process 0; write host:port, such as 10.0.0.2:8476")
    return host.strip("[]"), int(port)


def connect(address: str, index: int, timeout: float) -> socket.socket:
    """A connection to the server, tried until the timeout. Raises ProcessGroupError."""
    end = time.monotonic() + timeout
    while True:
        try:
            return socket.create_connection(split_address(address), timeout=min(5.0, timeout))
        except OSError as e:
            reason = f"process {index} cannot reach process 0 at {address} within {timeout:g} s ({e.strerror or e})"
        if time.monotonic() > end:
            raise ProcessGroupError(f"{reason}; start all processes, and check that this is its address and that the port is open")
        time.sleep(0.2)


def send(connection: socket.socket, **message: Any) -> None:
    """Sends one message. A broken connection is for the thread that receives from it to notice."""
    with contextlib.suppress(OSError):
        connection.sendall((json.dumps(message) + "\n").encode())


def receive(connection: socket.socket) -> Iterator[dict[str, Any]]:
    """Messages, until the connection ends, times out, or brings something else."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        for line in connection.makefile("r", encoding="utf-8"):
            yield dict(json.loads(line))


def exit_now(code: int) -> None:
    """Ends this process at once: an orderly exit would wait minutes for processes that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
