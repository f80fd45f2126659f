"""The process of a reward service: its port, its signals, and clients that are too slow to be waited for."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
from typing import Any

from xomni_jax.rewards.scorer import ServiceError, need
from xomni_jax.rewards.server import TOKEN, ServiceConfig, create_app
from xomni_jax.rewards.workers import ONE_THREAD


def serve(config: ServiceConfig, host: str = "127.0.0.1", port: int = 8001, tls: tuple[str, str] = ("", "")) -> None:
    """Run a service until SIGTERM or Ctrl-C, with the files of a certificate and its key for TLS.

    ServiceError when the port is taken, a file is missing or the scorer cannot start.
    """
    uvicorn = need("uvicorn", config.scorer)
    if any(tls) and not all(map(os.path.isfile, tls)):
        raise ServiceError(f"--tls-cert {tls[0] or '(none)'} and --tls-key {tls[1] or '(none)'} must both name files")
    os.environ.update(ONE_THREAD)  # inherited by the workers, whose numpy and OpenMP read it while they are imported
    listener = _listen(config.scorer, host, port)
    # uvicorn raises the signal again after an orderly shutdown; that must not look like a crash.
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, _leave)
    url = "{}://{}:{}".format("https" if tls[0] else "http", *listener.getsockname()[:2])
    line = f"reward service {config.scorer} ({config.workers} workers) ready on {url}; stop it with Ctrl-C"
    if host not in ("127.0.0.1", "::1", "localhost") and not os.environ.get(TOKEN):
        print(f"warning: whoever reaches {url} can use this service; set {TOKEN} here and for its clients", file=sys.stderr)

    def stop() -> None:
        server.should_exit = True

    app = create_app(config, ready=lambda: print(line, flush=True), failed=stop)
    settings = uvicorn.Config(
        app, log_level="critical", access_log=False, lifespan="on", http=_impatient(config.header_seconds), ws="none",
        limit_concurrency=config.max_connections, timeout_keep_alive=75, timeout_graceful_shutdown=config.drain_seconds,
        **({"ssl_certfile": tls[0], "ssl_keyfile": tls[1]} if tls[0] else {}),
    )  # fmt: skip
    server = uvicorn.Server(settings)
    with listener:
        try:
            server.run(sockets=[listener])
        except OSError as error:  # of the certificate: the port is already open
            raise ServiceError(f"--tls-cert {tls[0]} and --tls-key {tls[1]} cannot be used ({error})") from None
    if app.state.failure:
        raise app.state.failure


def _impatient(seconds: float) -> type:
    """uvicorn's HTTP protocol, which closes a connection whose next request does not begin, or whose head is not complete, in time."""
    h11_impl = need("uvicorn.protocols.http.h11_impl", "")

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


def _listen(scorer: str, host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise ServiceError(f"--port {port} is no port; give a number from 1 to 65535, or 0 for a free one")
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
            raise ServiceError(f"--host {host} is no address of this machine ({error.strerror}); {here}") from None
        raise ServiceError(
            f"port {port} on {host} cannot be used ({error.strerror}); "
            f"stop what runs there or choose another: xomni serve-reward {scorer} --port {port % 65535 + 1}"
        ) from None
    return listener


def _leave(*_: Any) -> None:
    raise SystemExit(0)
