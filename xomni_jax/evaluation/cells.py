"""One cell of a comparison: P prompts x R images drawn one way, with everything measured on them, kept on disk.

An interrupted evaluation goes on from the cells that are complete; one whose settings, models or services changed is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from xomni_jax.evaluation.images import code_agreement, colour_histogram, edge_density
from xomni_jax.rewards.client import Score

FORMAT = 1
MAX_FAILED = 0.2  # a cell in which more images than this could not be scored by a service is refused, not kept
IN_FLIGHT = 2  # chunks being scored while the next one is drawn

# metric -> (service, key of its detail; None is the score itself)
METRICS: dict[str, tuple[str, str | None]] = {
    "ocr_reward": ("ocr", None),
    "word_accuracy": ("ocr", "exact"),
    "colour_reward": ("shapes", None),
    "colour_accuracy": ("shapes", "colour_exact"),
    "second_reader_accuracy": ("second", "exact"),
}
REWARDS = {service: metric for metric, (service, key) in METRICS.items() if key is None}


class Client(Protocol):
    """The part of `rewards.client.RewardClient` that is used here."""

    def score_async(self, images: Sequence[Any], items: Sequence[dict[str, Any]]) -> Future[list[Score]]:
        """Begins to score."""
        ...

    def wait(self, future: Future[list[Score]]) -> list[Score]:
        """The scores."""
        ...


class EvaluationError(ValueError):
    """An evaluation cannot be made or go on. One sentence with the mend."""


@dataclass
class Cell:
    """P prompts x R images and what was measured.

    Attributes:
      images: uint8 [P, R, H, W, 3].
      metrics: name -> [P, R], NaN where it could not be had; those of services that were not asked are absent. Beside `METRICS`:
        edge_density and, for images made from codes, reencode_agreement.
      colours: share of pixels per colour [P, R, 64].
      texts: what each reader read, reader -> [P, R] of str.
      failures: service -> images that it could not score; they are NaN in its metrics.
    """

    images: np.ndarray
    metrics: dict[str, np.ndarray]
    colours: np.ndarray
    texts: dict[str, np.ndarray]
    failures: dict[str, int] = field(default_factory=dict)

    def selection(self, weights: Mapping[str, float]) -> np.ndarray:
        """The reward that best-of-N picks by [P, R]: weighted sum of the measured rewards, NaN where one of them failed.

        Raises:
          EvaluationError: none of the weighted rewards was measured.
        """
        counted = {REWARDS[s]: w for s, w in weights.items() if w and REWARDS.get(s) in self.metrics}
        if not counted:
            raise EvaluationError(
                f"none of the rewards that the run was trained on ({', '.join(weights) or 'none'}) was measured here; "
                "pass the URL of its service"
            )
        return sum(weight * self.metrics[metric] for metric, weight in counted.items())

    def save(self, path: Path, key: str) -> None:
        """Writes the cell; readers see the whole file or none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {
            "key": np.array(key),
            "images": self.images,
            "colours": self.colours,
            "failures": np.array(json.dumps(self.failures)),
        }
        arrays |= {f"metric.{name}": value for name, value in self.metrics.items()} | {
            f"text.{name}": value for name, value in self.texts.items()
        }
        part = path.with_name(path.name + ".part")
        with part.open("wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(part, path)

    @classmethod
    def load(cls, path: Path, key: str) -> Cell | None:
        """The stored cell, or None when there is none, it is damaged, or it was made with other settings."""
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as stored:
                if str(stored["key"]) != key:
                    return None
                group = lambda prefix: {n.removeprefix(prefix): stored[n] for n in stored.files if n.startswith(prefix)}  # noqa: E731
                failures = json.loads(str(stored["failures"]))
                return cls(stored["images"], group("metric."), stored["colours"], group("text."), failures)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            return None


def cell_key(**facts: Any) -> str:
    """A short name of everything a cell depends on; facts are JSON-able."""
    return hashlib.sha256(json.dumps({"format": FORMAT} | facts, sort_keys=True).encode()).hexdigest()[:24]


def directory_stamp(directory: str | Path) -> str:
    """Changes when any file of a model directory does: names, sizes and times, not contents."""
    root = Path(directory)
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return hashlib.sha256(repr([(str(p.relative_to(root)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]).encode()).hexdigest()[
        :16
    ]


def measure(
    name: str,
    chunks: Iterable[tuple[np.ndarray, np.ndarray | None, np.ndarray | None]],
    items: Sequence[dict[str, Any]],
    prompts: int,
    clients: Mapping[str, Client],
    advance: Callable[[int], None] = lambda n: None,
) -> Cell:
    """Scores images while the next ones are being drawn.

    Args:
      name: of the cell, for messages.
      chunks: (images [B, H, W, 3], codes [B, Y, X] or None, codes of the decoded images or None), in the order of `items`.
      items: {"prompt", "targets"} per image, images of a prompt side by side.
      prompts: P; len(items) = P * R.
      clients: service -> client; "ocr", "shapes", "second".
      advance: told how many more images are scored.

    Raises:
      EvaluationError: a service failed on more than `MAX_FAILED` of the images.
    """
    images, agreement, done = [], [], {service: [] for service in clients}
    waiting: deque[tuple[int, dict[str, Future]]] = deque()

    def collect() -> None:
        count, futures = waiting.popleft()
        for service, future in futures.items():
            done[service].extend(clients[service].wait(future))
        advance(count)

    start = 0
    for drawn, codes, again in chunks:
        part = items[start : start + len(drawn)]
        start += len(drawn)
        waiting.append((len(drawn), {service: client.score_async(list(drawn), part) for service, client in clients.items()}))
        images.append(drawn)
        if codes is not None:
            agreement.append(code_agreement(codes, again))
        if len(waiting) > IN_FLIGHT:
            collect()
    while waiting:
        collect()
    table = lambda x: np.asarray(x).reshape(prompts, -1, *np.shape(x)[1:])  # noqa: E731
    images = table(np.concatenate(images))
    metrics = {metric: table([_value(s, key) for s in done[service]]) for metric, (service, key) in METRICS.items() if service in clients}
    metrics["edge_density"] = edge_density(images).astype(np.float64)
    if agreement:
        metrics["reencode_agreement"] = table(np.concatenate(agreement))
    readers = [service for service in ("ocr", "second") if service in clients]
    texts = {service: table([str(s.detail.get("text", "")) for s in done[service]]) for service in readers}
    failures = {service: _failures(name, service, scores) for service, scores in done.items()}
    return Cell(images, metrics, colour_histogram(images), texts, failures)


def _value(score: Score, key: str | None) -> float:
    value = score.value if key is None or score.value is None else score.detail.get(key)
    return float("nan") if value is None else float(value)


def _failures(name: str, service: str, scores: Sequence[Score]) -> int:
    failed = [s for s in scores if s.value is None]
    if len(failed) > MAX_FAILED * len(scores):
        reason = failed[0].error or "it says the images are none of its business"
        raise EvaluationError(
            f"{name}: {len(failed)} of {len(scores)} images could not be scored by {service} ({reason}); "
            "mend the service and run the same command again, finished parts are kept"
        )
    return len(failed)
