"""Images on their way to the scorers, and the scores on their way back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future

import jax
import numpy as np

from xomni_jax.core.distributed import gather_json
from xomni_jax.core.preemption import StepRefused, StopRequested, StopSignal
from xomni_jax.rewards.client import RewardClient
from xomni_jax.rewards.protocol import Item, Score
from xomni_jax.rl.text_statistics import join_text_counts, text_counts
from xomni_jax.sharding.arrays import rows_here


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the time that passes within to `seconds[name]`."""
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] += time.perf_counter() - began


class Scoring:
    """The images of one batch of rollouts on their way to the scorers, chunk by chunk, and the scores on their way back.

    Attributes:
      decoding: images [chunk, H, W, 3] of chunks that the image decoder may still be working on.
      images: this process's images of the chunks that have been sent.
      texts: metrics of the texts that were read, once the scores are known.
    """

    def __init__(
        self,
        clients: Mapping[str, RewardClient],
        items: Sequence[Item],
        judges: Sequence[Collection[str]],
        rows: Sequence[int],
        chunk: int,
        stop: StopSignal,
        progress: float | None = None,
    ):
        """`items` of all rollouts, `chunk` of them at a time, and the names of the rewards that are asked about each.

        `rows` of a chunk are those whose scores this process asks for.
        """
        self.clients, self.items, self.judges, self.rows, self.chunk, self.stop = clients, items, judges, rows, chunk, stop
        self.progress = progress
        self.decoding: list[jax.Array] = []
        self.images: list[np.ndarray] = []
        self.texts: dict[str, float] = {}
        # Of each chunk, by reward: which of `rows` it is asked about, and their scores.
        self._waiting: list[dict[str, tuple[list[int], Future[list[Score]]]]] = []

    def send(self, wait: bool) -> None:
        """Sends decoded images to the scorers; without `wait` only those that are ready."""
        while self.decoding and (wait or self.decoding[0].is_ready()):
            first = len(self.images) * self.chunk
            images = rows_here(self.decoding.pop(0), self.rows)
            self.images.append(images)
            waiting = {}
            for name, client in self.clients.items():
                if asked := [n for n, row in enumerate(self.rows) if name in self.judges[first + row]]:
                    items = [self.items[first + self.rows[n]] for n in asked]
                    waiting[name] = asked, client.score_async([images[n] for n in asked], items, self.progress)
            self._waiting.append(waiting)

    def scores(self) -> dict[str, list[Score]]:
        """{reward: a score for every rollout of the batch}: waits for this process's own and exchanges them with the others.

        A stop is acted upon after the exchange, which all must make: whoever raised before would leave the others waiting.

        Raises:
          StepRefused: another version of a scorer answers than before.
        """
        poll = self.stop.check_waiting
        try:
            own = [{name: (asked, self.clients[name].wait(f, poll)) for name, (asked, f) in chunk.items()} for chunk in self._waiting]
        except StopRequested:
            own = []
        # Without the details, of which there may be much.
        told = [
            (name, c * self.chunk + self.rows[n], score.value, score.error, score.kind)
            for c, chunk in enumerate(own)
            for name, (asked, scores) in chunk.items()
            for n, score in zip(asked, scores, strict=True)
        ]
        texts = [
            text_counts([self.items[c * self.chunk + self.rows[n]] for n in asked], scores)
            for c, chunk in enumerate(own)
            for asked, scores in chunk.values()
        ]
        faults = [client.replicas.fault for client in self.clients.values() if client.replicas.fault]
        table = gather_json({"scores": told, "texts": texts, "faults": faults})
        self.stop.check()
        for fault in (fault for part in table for fault in part["faults"]):
            raise StepRefused(fault)
        self.texts = join_text_counts([counts for part in table for counts in part["texts"]])
        out = {name: [Score(None)] * len(self.items) for name in self.clients}
        for name, row, value, error, kind in (entry for part in table for entry in part["scores"]):
            out[name][row] = Score(value, error, kind=kind)
        return out
