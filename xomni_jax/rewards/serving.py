"""The process of a reward service."""

from __future__ import annotations

import os
from typing import Any

from xomni_jax.core import http
from xomni_jax.rewards.scorer import need
from xomni_jax.rewards.server import TOKEN, ServiceConfig, create_app
from xomni_jax.rewards.workers import ONE_THREAD


def serve(config: ServiceConfig, host: str = "127.0.0.1", port: int = 8001, tls: tuple[str, str] = ("", "")) -> None:
    """Run a service until SIGTERM or Ctrl-C, with the files of a certificate and its key for TLS.

    ValueError when the port is taken, a file is missing or the scorer cannot start.
    """
    need("uvicorn", config.scorer)
    os.environ.update(ONE_THREAD)  # inherited by the workers, whose numpy and OpenMP read it while they are imported
    apps = []

    def make_app(url: str, stop: Any) -> Any:
        line = f"reward service {config.scorer} ({config.workers} workers) ready on {url}; stop it with Ctrl-C"
        apps.append(create_app(config, ready=lambda: print(line, flush=True), failed=stop))
        return apps[0]

    http.serve(make_app, config, f"xomni serve-reward {config.scorer}", host, port, tls, TOKEN)
    if apps[0].state.failure:
        raise apps[0].state.failure
