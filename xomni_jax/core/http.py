"""What every HTTP service needs before it answers: its port, a token, bounded bodies, slow clients, an orderly end."""

from __future__ import annotations

import asyncio
import errno
import hmac
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Refusal(Exception):
    """A request that is not accepted: args are the status, one sentence, and seconds after which to try again or 0."""


@dataclass(frozen=True, kw_only=True)
class HTTPOptions:
    """Flags of every service about its connections.

    Attributes:
      max_connections: open at a time; more are answered 503
      header_seconds: most that a client may take to send the head of a request
      body_seconds: and its body
      drain_seconds: most that the requests under way may take after SIGTERM
    """

    max_connections: int = 256
    header_seconds: float = 10.0
    body_seconds: float = 60.0
    drain_seconds: int = 50

    def __post_init__(self) -> None:
        self.check_positive("max_connections", "header_seconds", "body_seconds", "drain_seconds")

    def check_positive(self, *names: str) -> None:
        """Raises ValueError naming the first flag that is not above 0."""
        for name in names:
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")


def check_token(headers: Any, token: str, variable: str) -> None:
    """Refuses a client without the bearer token, compared in constant time; `variable` of the environment holds it. "": none is needed."""
    given = headers.get("authorization", "").encode()
    if token and not hmac.compare_digest(given, f"Bearer {token}".encode()):
        raise Refusal(401, f"the bearer token is missing or wrong; set {variable} to that of the service", 0)


class BodyReader:
    """Reads bodies of requests, which take a bounded memory together.

    Args:
      limit: bytes of one body. seconds: in which it must arrive.
      most: bytes of all bodies that are being received.
      remedy: what a client should do whose body is too large.

    Attributes:
      held: bytes that are being received.
    """

    def __init__(self, limit: int, seconds: float, most: int, remedy: str):
        self._limit, self._seconds, self._most, self._remedy, self.held = limit, seconds, most, remedy, 0

    async def read(self, request: Any) -> bytes:
        """The body; refused as soon as it exceeds a limit, whatever its header says, or takes too long."""
        body = bytearray()
        try:
            async with asyncio.timeout(self._seconds):
                async for part in request.stream():
                    body += part
                    self.held += len(part)
                    if len(body) > self._limit:
                        raise Refusal(413, f"the request is larger than {self._limit} bytes; {self._remedy}", 0)
                    if self.held > self._most:
                        raise Refusal(429, "too many requests are being received; try again", 1)
        except TimeoutError:
            raise Refusal(408, f"the request did not arrive within {self._seconds:g} s", 1) from None
        finally:
            self.held -= len(body)
        return bytes(body)


def prometheus(prefix: str, labels: str, numbers: Iterable[tuple[str, str, float]]) -> str:
    """(name, counter | gauge, value) of each number in Prometheus' text format; a name may carry labels of its own in braces."""
    lines, typed = [], set[str]()
    for name, kind, value in numbers:
        bare, _, own = name.partition("{")
        if bare not in typed:
            typed.add(bare)
            lines.append(f"# TYPE {prefix}_{bare} {kind}")
        inside = ",".join(filter(None, (labels, own.rstrip("}"))))
        lines.append(f"{prefix}_{bare}" + f"{{{inside}}}" * bool(inside) + f" {value}")
    return "\n".join(lines) + "\n"


def listen(host: str, port: int, command: str) -> socket.socket:
    """A listening socket. ValueError when the port is taken or the address is not of this machine; `command` is how to start again."""
    if not 0 <= port <= 65535:
        raise ValueError(f"--port {port} is no port; give a number from 1 to 65535, or 0 for a free one")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            here = "use 127.0.0.1 for this machine alone, or 0.0.0.0 to let others in"
            raise ValueError(f"--host {host} is no address of this machine ({error.strerror}); {here}") from None
        raise ValueError(
            f"port {port} on {host} cannot be used ({error.strerror}); "
            f"stop what runs there or choose another: {command} --port {port % 65535 + 1}"
        ) from None
    return listener


def serve(
    make_app: Callable[[str, Callable[[], None]], Any],
    options: HTTPOptions,
    command: str,
    host: str,
    port: int,
    tls: tuple[str, str],
    token: str,
) -> None:
    """Runs an ASGI application until SIGTERM or Ctrl-C.

    Args:
      make_app: (the URL, a function that stops the server) -> the application.
      command: how a user starts this service. tls: files of a certificate and its key. token: environment variable of the bearer token.

    Raises:
      ValueError: the port is taken, or a file is missing or no certificate.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise ValueError(f"a service needs the package {error.name!r}: pip install 'xomni_jax[serve]'") from error
    if any(tls) and not all(map(os.path.isfile, tls)):
        raise ValueError(f"--tls-cert {tls[0] or '(none)'} and --tls-key {tls[1] or '(none)'} must both name files")
    listener = listen(host, port, command)
    # uvicorn raises the signal again after an orderly shutdown; that must not look like a crash.
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, _leave)
    url = "{}://{}:{}".format("https" if tls[0] else "http", *listener.getsockname()[:2])
    if host not in LOOPBACK and not os.environ.get(token):
        print(f"warning: whoever reaches {url} can use this service; set {token} here and for its clients", file=sys.stderr)

    def stop() -> None:
        server.should_exit = True

    settings = uvicorn.Config(
        make_app(url, stop), log_level="critical", access_log=False, lifespan="on", http=_impatient(options.header_seconds), ws="none",
        limit_concurrency=options.max_connections, timeout_keep_alive=75, timeout_graceful_shutdown=options.drain_seconds,
        **({"ssl_certfile": tls[0], "ssl_keyfile": tls[1]} if tls[0] else {}),
    )  # fmt: skip
    server = uvicorn.Server(settings)
    with listener:
        try:
            server.run(sockets=[listener])
        except OSError as error:  # of the certificate: the port is already open
            raise ValueError(f"--tls-cert {tls[0]} and --tls-key {tls[1]} cannot be used ({error})") from None


def _impatient(seconds: float) -> type:
    """uvicorn's HTTP protocol, which closes a connection whose next request does not begin, or whose head is not complete, in time."""
    from uvicorn.protocols.http import h11_impl

    class Impatient(h11_impl.H11Protocol):
        timer: Any = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.timer = self.loop.call_later(seconds, transport.close)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            waits = self.conn.their_state is h11_impl.h11.IDLE  # the head of a request is not complete
            if self.timer and not waits:
                self.timer.cancel()
                self.timer = None
            elif waits and not self.timer:
                self.timer = self.loop.call_later(seconds, self.transport.close)

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self.timer:
                self.timer.cancel()

    return Impatient


def _leave(*_: Any) -> None:
    raise SystemExit(0)
