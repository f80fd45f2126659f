"""What `xomni eval effect` measures on images: rewards and correctness by the services, and image statistics that no service decides."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xomni_jax.evaluation.statistics import best_of_weights, weighted_rows
from xomni_jax.evaluation.suite import SuiteError

MAX_FAILED = 0.2  # share of images that a service may fail to score before the measurement is refused
COLOUR_BINS = 64  # 4 levels per channel

# metric -> (service, key of its detail; None is the score itself)
METRICS: dict[str, tuple[str, str | None]] = {
    "ocr_reward": ("ocr", None),
    "word_accuracy": ("ocr", "exact"),
    "colour_reward": ("shapes", None),
    "colour_accuracy": ("shapes", "colour_exact"),
    "second_reader_accuracy": ("second", "exact"),
}
REWARDS = {service: metric for metric, (service, key) in METRICS.items() if key is None}


@dataclass(frozen=True)
class Measurement:
    """P prompts x R images and what was measured, each image with a weight.

    Attributes:
      images: uint8 [P, R, H, W, 3].
      metrics: name -> [P, R], NaN where unknown; those of services that were not asked are absent. Beside `METRICS`: edge_density and,
        for images made from codes, reencode_agreement.
      colours: share of pixels per colour [P, R, 64].
      texts: what each reader read, reader -> [P, R] of str.
      failures: service -> number of images that it could not score; they are NaN in its metrics.
      weights_PR: how much an image counts in the mean of its prompt: all alike, or the chance to be picked as the best of N.
    """

    images: np.ndarray
    metrics: dict[str, np.ndarray]
    colours: np.ndarray
    texts: dict[str, np.ndarray]
    failures: dict[str, int]
    weights_PR: np.ndarray

    def values(self, metric: str) -> np.ndarray:
        """Mean of a metric per prompt [P]; all NaN when it was not measured."""
        return weighted_rows(self.metrics.get(metric, np.full_like(self.weights_PR, np.nan)), self.weights_PR)

    def best_of(self, n: int, selection_PR: np.ndarray) -> Measurement:
        """The same images, each weighted by its chance to be the best of n of its prompt."""
        return dataclasses.replace(self, weights_PR=best_of_weights(selection_PR, n))

    def counted(self, weights: Mapping[str, float]) -> dict[str, float]:
        """The weights of the rewards that were measured."""
        return {service: weight for service, weight in weights.items() if REWARDS.get(service) in self.metrics}

    def selection(self, weights: Mapping[str, float]) -> np.ndarray:
        """The reward that best-of-N picks by [P, R]: weighted sum of the measured rewards, NaN where one of them failed.

        Raises:
          SuiteError: none of the weighted rewards was measured.
        """
        if not (counted := self.counted(weights)):
            raise SuiteError(
                f"none of the rewards that the run was trained on ({', '.join(weights) or 'none'}) was measured here; "
                "pass the URL of its service"
            )
        return sum(weight * self.metrics[REWARDS[service]] for service, weight in counted.items())


def measure(name: str, images: np.ndarray, replies_PR: Sequence[Sequence[Mapping[str, Any]]], agreement: Any = None) -> Measurement:
    """What is measured on images.

    Args:
      name: of the measurement, for messages.
      images: uint8 [P, R, H, W, 3].
      replies_PR: service -> {"value", "error", "detail"} per image, see `judges.RewardsJudge`.
      agreement: re-encode agreement [P, R] of images made from codes.

    Raises:
      SuiteError: a service failed on more than `MAX_FAILED` of the images.
    """
    services = list(replies_PR[0][0])
    failures = {service: _failures(name, service, [reply[service] for row in replies_PR for reply in row]) for service in services}

    def metric(service: str, key: str | None) -> np.ndarray:
        return np.array([[_value(reply[service], key) for reply in row] for row in replies_PR], np.float64)

    metrics = {name: metric(service, key) for name, (service, key) in METRICS.items() if service in services}
    metrics["edge_density"] = edge_density(images).astype(np.float64)
    if agreement is not None:
        metrics["reencode_agreement"] = np.asarray(agreement, np.float64)
    texts = {
        service: np.array([[str(reply[service]["detail"].get("text", "")) for reply in row] for row in replies_PR])
        for service in ("ocr", "second")
        if service in services
    }
    return Measurement(images, metrics, colour_histogram(images), texts, failures, np.ones(images.shape[:2]))


def _value(reply: Mapping[str, Any], key: str | None) -> float:
    value = reply["value"] if key is None or reply["value"] is None else reply["detail"].get(key)
    return float("nan") if value is None else float(value)


def _failures(name: str, service: str, replies: Sequence[Mapping[str, Any]]) -> int:
    failed = [reply for reply in replies if reply["value"] is None]
    if len(failed) > MAX_FAILED * len(replies):
        reason = failed[0]["error"] or "it does not apply to these images"
        raise SuiteError(
            f"{name}: {len(failed)} of {len(replies)} images could not be scored by {service} ({reason}); "
            "fix the service and run the same command again, finished parts are kept"
        )
    return len(failed)


# ---- statistics that do not depend on any reader: reward hacking would move them ----
def edge_density(images: np.ndarray) -> np.ndarray:
    """Mean absolute difference of neighbouring pixels, down plus across, 0..510 per image. uint8 [..., H, W, 3] -> [...]."""
    x = images.astype(np.float32)
    return np.abs(np.diff(x, axis=-3)).mean((-3, -2, -1)) + np.abs(np.diff(x, axis=-2)).mean((-3, -2, -1))


def colour_histogram(images: np.ndarray) -> np.ndarray:
    """Share of pixels in each of 64 colours. uint8 [..., H, W, 3] -> [..., 64], rows sum to 1."""
    level = images >> 6
    index = ((level[..., 0].astype(np.int64) * 4 + level[..., 1]) * 4 + level[..., 2]).reshape(-1, level.shape[-3] * level.shape[-2])
    counts = np.stack([np.bincount(row, minlength=COLOUR_BINS) for row in index])
    return (counts / index.shape[-1]).reshape(*level.shape[:-3], COLOUR_BINS)


def colour_entropy(share: np.ndarray) -> float:
    """Bits of a colour distribution [64]; of the pooled images, so that it falls when all of them turn the same colour."""
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())
