"""Worker processes that score: each holds one instance of the scorer and computes on one thread."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import msgspec
import numpy as np

from xomni_jax.core.config import build
from xomni_jax.rewards.protocol import Item, Limits, ProtocolError, Score, decode_image, slices
from xomni_jax.rewards.scorer import Scorer, ServiceError, Unavailable, build_scorer, scorer_class

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_THREAD_LIMIT": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_SLICE = 8  # images handed to a worker at a time: small enough that requests share the workers fairly
_scorer: Scorer | None = None  # of this process, if it is a worker
_first_state: dict[str, np.ndarray] = {}  # of a scorer of whole sets, before any request


_About = tuple[float | None, bytes]  # the progress and the state of a request


class _Lost(Exception):
    """The worker that had a slice died, or took too long and was ended."""


# ---- the service's side ----
class Workers:
    """The processes of a service. A worker gets one slice of a request at a time; one that dies or hangs is replaced.

    Args:
      seconds: most that a slice may take.

    Attributes:
      version, model_hash: of the scorer.
      images, seconds_busy: how many images the workers have scored, and in how much time of theirs.
    """

    def __init__(self, scorer: str, options: dict[str, Any], count: int, limits: Limits, seconds: float = 300.0):
        cls = scorer_class(scorer)
        self.version = self.model_hash = ""
        self.images, self.seconds_busy = 0, 0.0
        self._start_arguments, self._limits, self._seconds, self._scope = (scorer, options), limits, seconds, cls.scope
        self._slice = getattr(build(cls.Options, options, f"scorer {cls.name}"), "batch", _SLICE)
        self._pools: list[ProcessPoolExecutor | None] = [None] * (1 if cls.scope == "set" else count)  # None: started before its next slice
        self._idle: asyncio.Queue[int] = asyncio.Queue()
        self._since: dict[int, float] = {}  # worker -> when it got the slice that it works on

    async def start(self) -> None:
        """Start every process and build its scorer. ServiceError when the scorer cannot start."""
        await asyncio.gather(*map(self._pool, range(len(self._pools))))
        for n in range(len(self._pools)):
            self._idle.put_nowait(n)

    async def score(
        self, images: list[bytes], items: list[Item], progress: float | None = None, state: bytes = b""
    ) -> tuple[list[Score], bytes]:
        """Scores of a request's images, in order, computed by all workers that are free, and what a scorer of whole sets remembers.

        `state`: what it is to remember before; without it, it starts anew.
        """
        return await self._score_parts(images, items, (progress, state), self._slice)

    def slowest(self) -> float:
        """Seconds since the longest running slice was given to its worker; 0 when all are idle."""
        return time.monotonic() - min(self._since.values()) if self._since else 0.0

    def close(self) -> None:
        """End the processes and abandon what they are doing."""
        for pool in filter(None, self._pools):
            for process in _processes(pool):
                process.terminate()
            pool.shutdown(wait=True, cancel_futures=True)

    async def _score_parts(self, images: list[bytes], items: list[Item], about: _About, size: int) -> tuple[list[Score], bytes]:
        parts = slices(items, size, self._scope)
        scored = await asyncio.gather(*(self._score_slice(images[p], items[p], about) for p in parts))
        return list(itertools.chain(*(scores for scores, _ in scored))), scored[-1][1] if scored else b""

    async def _score_slice(self, images: list[bytes], items: list[Item], about: _About) -> tuple[list[Score], bytes]:
        """A slice whose worker is lost is scored again in the smallest parts, so that only the image at fault has failed."""
        n = await self._idle.get()
        # Goes on when the request is abandoned: a worker that still computes must not get another slice.
        running = asyncio.ensure_future(self._use(n, images, items, about))
        running.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            return await asyncio.shield(running)
        except _Lost as lost:
            if len(slices(items, 1, self._scope)) == 1:
                return [Score(None, str(lost))] * len(images), about[1]
            return await self._score_parts(images, items, about, 1)

    async def _use(self, n: int, images: list[bytes], items: list[Item], about: _About) -> tuple[list[Score], bytes]:
        began = time.monotonic()
        try:
            pool = await self._pool(n)
            began = self._since[n] = time.monotonic()
            async with asyncio.timeout(self._seconds):
                return await asyncio.wrap_future(pool.submit(_score_files, images, items, self._limits, about))
        except ServiceError as error:  # it started once, and does not now
            raise _Lost(str(error)) from None
        except (BrokenProcessPool, TimeoutError) as error:
            if pool := self._pools[n]:
                for process in _processes(pool):
                    process.kill()
                pool.shutdown(wait=False, cancel_futures=True)
            self._pools[n] = None
            slow = isinstance(error, TimeoutError)
            raise _Lost(f"scoring took more than {self._seconds:g} s" if slow else "the worker process died while scoring") from None
        finally:
            self._since.pop(n, None)
            self.images, self.seconds_busy = self.images + len(images), self.seconds_busy + time.monotonic() - began
            self._idle.put_nowait(n)

    async def _pool(self, n: int) -> ProcessPoolExecutor:
        """Worker n; it is started first if it never was or has died."""
        pool = self._pools[n]
        if pool is None:
            pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_prepare, initargs=(os.getpid(),))
            try:
                self.version, self.model_hash = await asyncio.wrap_future(pool.submit(_start, *self._start_arguments))
            except ServiceError:
                pool.shutdown(wait=True)  # it is idle; an interpreter that ends while a pool closes may print a traceback
                raise
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            self._pools[n] = pool
        return pool


def _processes(pool: ProcessPoolExecutor) -> list[Any]:
    """Its processes, which know whether they have ended: a bare number may be another process's by then."""
    return list((pool._processes or {}).values())


# ---- the worker's side ----
def score_batch(scorer: Scorer, images: Sequence[np.ndarray], items: Sequence[Item]) -> list[Score]:
    """Scores of decoded images. A batch that raises is scored again in the smallest parts, so that an image fails alone.

    Raises:
      Unavailable: the scorer cannot work for now.
    """
    try:
        scores = scorer.score(images, items)
        if len(scores) != len(images) or not all(isinstance(score, Score) for score in scores):
            raise TypeError(f"it must return one Score per image, {len(images)} in all, not {str(scores):.200}")
        return [score.checked(scorer.range) for score in scores]
    except Unavailable:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a scorer raises concerns these images alone
        parts = slices(items, 1, scorer.scope)
        if len(parts) == 1:
            return [Score(None, f"{scorer.name} failed: {type(error).__name__}: {error}"[:500])] * len(images)
        return [score for part in parts for score in score_batch(scorer, images[part], items[part])]


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


def _start(name: str, options: dict[str, Any]) -> tuple[str, str]:
    """Build the scorer of this process; returns its version and model hash. Exceptions must be importable in the parent."""
    global _scorer, _first_state
    try:
        _scorer = build_scorer(name, options)
        _first_state = _scorer.state()
    except ValueError as error:
        raise ServiceError(str(error)) from None
    except Exception as error:  # noqa: BLE001 - a scorer may be the user's own code
        raise ServiceError(f"scorer {name!r} cannot start: {type(error).__name__}: {error}") from None
    return _scorer.version, _scorer.model_hash


def _score_files(files: list[bytes], items: list[Item], limits: Limits, about: _About) -> tuple[list[Score], bytes]:
    _scorer.progress, state = about
    if _scorer.scope != "set":
        return score_files(_scorer, files, items, limits), b""
    try:
        _scorer.restore(read_state(state) if state else _first_state)
    except Exception as error:  # noqa: BLE001 - whatever these bytes, or a user's own scorer, bring about
        return [Score(None, f"the state of the request is none of {_scorer.name} with these options: {error}"[:500])] * len(files), state
    return score_files(_scorer, files, items, limits), write_state(_scorer.state())


# ---- what a scorer remembers, as bytes ----
def write_state(state: dict[str, np.ndarray]) -> bytes:
    """Arrays by name as one message; nothing as b""."""
    arrays = {name: (x.dtype.str, x.shape, np.ascontiguousarray(x).tobytes()) for name, x in state.items()}
    return msgspec.msgpack.encode(arrays) if arrays else b""


def read_state(data: bytes) -> dict[str, np.ndarray]:
    """What `write_state` has written; it raises for anything else, and its arrays are no larger than the message."""
    arrays = msgspec.msgpack.decode(data, type=dict[str, tuple[str, tuple[int, ...], bytes]])
    return {name: np.frombuffer(x, np.dtype(dtype)).reshape(shape) for name, (dtype, shape, x) in arrays.items()}
