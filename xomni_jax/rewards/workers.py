"""Worker processes that score: each holds one instance of the scorer and computes on one thread."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from xomni_jax.rewards.protocol import Item, Limits, ProtocolError, Score, decode_image
from xomni_jax.rewards.scorer import Scorer, ServiceError, build_scorer

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_THREAD_LIMIT": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_SLICE = 8  # images handed to a worker at a time: small enough that requests share the workers fairly
_scorer: Scorer | None = None  # of this process, if it is a worker


# ---- the service's side ----
class Workers:
    """The processes of a service. A worker gets one slice of a request at a time; one that dies is replaced."""

    def __init__(self, scorer: str, options: dict[str, Any], count: int, limits: Limits):
        self.version = ""
        self._scorer, self._options, self._limits = scorer, options, limits
        self._pools: list[ProcessPoolExecutor | None] = [None] * count  # None: started before its next slice
        self._idle: asyncio.Queue[int] = asyncio.Queue()

    async def start(self) -> None:
        """Start every process and build its scorer. ServiceError when the scorer cannot start."""
        await asyncio.gather(*map(self._pool, range(len(self._pools))))
        for n in range(len(self._pools)):
            self._idle.put_nowait(n)

    async def score(self, images: list[bytes], items: list[Item]) -> list[Score]:
        """Scores of a request's images, in order, computed by all workers that are free."""
        slices = [slice(n, n + _SLICE) for n in range(0, len(images), _SLICE)]
        parts = await asyncio.gather(*(self._score_slice(images[s], items[s]) for s in slices))
        return [score for part in parts for score in part]

    def close(self) -> None:
        """End the processes and abandon what they are doing."""
        for pool in filter(None, self._pools):
            for process in list((pool._processes or {}).values()):
                process.terminate()
            pool.shutdown(wait=True, cancel_futures=True)

    async def _score_slice(self, images: list[bytes], items: list[Item]) -> list[Score]:
        n = await self._idle.get()
        try:
            pool = await self._pool(n)
            return await asyncio.wrap_future(pool.submit(_score_files, images, items, self._limits))
        except BrokenProcessPool:
            # Answered, not retried: the image that killed this worker would kill the next one.
            self._pools[n] = None
            return [Score(None, "the worker process died while scoring this slice") for _ in images]
        finally:
            self._idle.put_nowait(n)

    async def _pool(self, n: int) -> ProcessPoolExecutor:
        """Worker n; it is started first if it never was or has died."""
        pool = self._pools[n]
        if pool is None:
            pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_prepare, initargs=(os.getpid(),))
            try:
                self.version = await asyncio.wrap_future(pool.submit(_start, self._scorer, self._options))
            except ServiceError:
                pool.shutdown(wait=True)  # it is idle; an interpreter that ends while a pool closes may print a traceback
                raise
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            self._pools[n] = pool
        return pool


# ---- the worker's side ----
def score_batch(scorer: Scorer, images: Sequence[np.ndarray], items: Sequence[Item]) -> list[Score]:
    """Scores of decoded images. A batch that raises is scored again image by image, so that an image fails alone."""
    try:
        scores = scorer.score(images, items)
        if len(scores) != len(images) or not all(isinstance(score, Score) for score in scores):
            raise TypeError(f"it must return one Score per image, {len(images)} in all, not {str(scores):.200}")
        return [score.checked() for score in scores]
    except Exception as error:  # noqa: BLE001 - whatever a scorer raises concerns these images alone
        if len(images) == 1:
            return [Score(None, f"{scorer.name} failed: {type(error).__name__}: {error}"[:500])]
        return [score for image, item in zip(images, items) for score in score_batch(scorer, [image], [item])]


def score_files(scorer: Scorer, files: Sequence[bytes], items: Sequence[Item], limits: Limits) -> list[Score]:
    """Scores of encoded images; those that cannot be read fail alone."""
    images: dict[int, np.ndarray] = {}
    scores: dict[int, Score] = {}
    for n, file in enumerate(files):
        try:
            images[n] = decode_image(file, limits)
        except ProtocolError as error:
            scores[n] = Score(None, str(error))
    if images:
        scores |= zip(images, score_batch(scorer, list(images.values()), [items[n] for n in images]))
    return [scores[n] for n in range(len(files))]


def _prepare(parent: int) -> None:
    """First call in the process: Ctrl-C is the parent's to handle, and the process ends with its parent, even one that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(0)

    threading.Thread(target=follow, daemon=True).start()


def _start(name: str, options: dict[str, Any]) -> str:
    """Build the scorer of this process and return its version. Exceptions reach the parent, so they must be importable there."""
    global _scorer
    try:
        _scorer = build_scorer(name, options)
    except ValueError as error:
        raise ServiceError(str(error)) from None
    except Exception as error:  # noqa: BLE001 - a scorer may be the user's own code
        raise ServiceError(f"scorer {name!r} cannot start: {type(error).__name__}: {error}") from None
    return _scorer.version


def _score_files(files: list[bytes], items: list[Item], limits: Limits) -> list[Score]:
    return score_files(_scorer, files, items, limits)
