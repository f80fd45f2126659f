"""What runs in a worker process: one scorer, one thread, images one after another."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from typing import Any, NamedTuple

from xomni_jax.rewards.protocol import Limits, ProtocolError, decode_image
from xomni_jax.rewards.services.base import Scorer, build

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_THREAD_LIMIT": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_scorer: Scorer | None = None


class Scored(NamedTuple):
    """Outcome for one image."""

    score: float | None
    error: str | None
    detail: dict[str, Any]


def prepare(parent: int) -> None:
    """First thing in the process: leave Ctrl-C to the parent, and end when the parent is gone (even by kill -9)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def start(name: str, options: dict[str, Any]) -> str:
    """Build the scorer in this process. Its version. ServiceError when it cannot start."""
    global _scorer
    _scorer = build(name, options)
    return _scorer.version


def score(images: list[bytes], items: list[dict[str, Any]], limits: Limits) -> list[Scored]:
    """Score encoded images. One that fails gives an error of its own; the others are scored all the same."""
    assert _scorer is not None, "start() comes first"
    return [score_one(_scorer, image, item, limits) for image, item in zip(images, items, strict=True)]


def score_one(scorer: Scorer, data: bytes, item: dict[str, Any], limits: Limits) -> Scored:
    """One image, any failure of it caught and named."""
    try:
        value, detail = scorer.score(decode_image(data, limits), item)
    except ProtocolError as error:
        return Scored(None, str(error), {})
    except Exception as error:  # noqa: BLE001 - whatever a scorer trips over concerns this image alone
        return Scored(None, f"{scorer.name} failed: {type(error).__name__}: {error}"[:500], {})
    if value is not None and not math.isfinite(value):
        return Scored(None, f"{scorer.name} gave a score that is not finite", detail)
    return Scored(None if value is None else float(value), None, detail)


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(0)
