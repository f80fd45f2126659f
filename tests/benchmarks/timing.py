"""Interleaved timing of two implementations: equality first, then pairs of runs, so that other load meets both sides."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

WARM_UPS = 3  # untimed runs of both sides, each compared; the first one compiles
MIN_PAIRS = 3
PAUSE = 0.01  # seconds between two runs: idle threads of a pool spin for a while, and must not take the other side's cores


class BenchError(ValueError):
    """A benchmark cannot be run, or its two sides do not do the same; one sentence."""


@dataclass(frozen=True)
class Case:
    """The same work on two sides.

    Attributes:
      ours, peer: do the work once, inputs already in place. Ours may return before it is done, the peer may not.
      difference: (ours' result, peer's result) -> how far they are apart; above `tolerance` nothing is timed.
      work, unit: what one run handles, for the rates.
      yardstick: not the benchmark itself but a part of it that explains its ratio.
    """

    name: str
    ours: Callable[[], Any]
    peer: Callable[[], Any]
    difference: Callable[[Any, Any], float]
    tolerance: float
    work: float
    unit: str
    yardstick: bool = False


@dataclass(frozen=True)
class Result:
    """Seconds of the timed pairs [n] and of each side's first run (ours compiles in it); largest difference before timing.

    `ours_cpu_s`, `peer_cpu_s`: processor time over all threads, which other programs on the machine hardly change.
    """

    case: Case
    ours_s: np.ndarray
    peer_s: np.ndarray
    ours_cpu_s: np.ndarray
    peer_cpu_s: np.ndarray
    first_ours_s: float
    first_peer_s: float
    difference: float

    @property
    def ratios(self) -> np.ndarray:
        """Peer / ours of every pair: above 1, ours is faster."""
        return self.peer_s / self.ours_s

    @property
    def ratio(self) -> float:
        """The median ratio."""
        return float(np.median(self.ratios))

    @property
    def cpu_ratio(self) -> float:
        """The median ratio of processor times, peer / ours."""
        return float(np.median(self.peer_cpu_s / self.ours_cpu_s))

    def as_json(self) -> dict[str, Any]:
        """Everything measured."""
        ours, peer = float(np.median(self.ours_s)), float(np.median(self.peer_s))
        return {
            "name": self.case.name,
            "yardstick": self.case.yardstick,
            "pairs": len(self.ratios),
            "ours_seconds": ours,
            "peer_seconds": peer,
            "ratio": {"median": self.ratio, "min": float(self.ratios.min()), "max": float(self.ratios.max())},
            "cpu_ratio": self.cpu_ratio,
            "rate": {"unit": f"{self.case.unit}/s", "ours": self.case.work / ours, "peer": self.case.work / peer},
            "first_run_seconds": {"ours": self.first_ours_s, "peer": self.first_peer_s},
            "difference": {"largest": self.difference, "tolerance": self.case.tolerance},
            "all_ours_seconds": self.ours_s.tolist(),
            "all_peer_seconds": self.peer_s.tolist(),
            "all_ours_cpu_seconds": self.ours_cpu_s.tolist(),
            "all_peer_cpu_seconds": self.peer_cpu_s.tolist(),
        }


def measure(case: Case, repeats: int, seconds: float) -> Result:
    """Warms both sides up, compares what they return, then times up to `repeats` pairs within about `seconds`, at least three.

    Raises:
      BenchError: the sides differ by more than the tolerance.
    """
    first, worst = (0.0, 0.0), 0.0
    for n in range(WARM_UPS):
        (ours_s, _), ours = _timed(lambda: jax.block_until_ready(case.ours()))
        (peer_s, _), peer = _timed(case.peer)
        first = first if n else (ours_s, peer_s)
        worst = max(worst, difference := case.difference(ours, peer))
        if not difference <= case.tolerance:
            raise BenchError(
                f"{case.name}: the two sides differ by {difference:.2e} (limit {case.tolerance:g}) in run {n + 1}, "
                "nothing was timed; run the live parity tests (bash launch/test.sh --parity) with the installed versions"
            )
    pairs, end = [], time.perf_counter() + seconds
    while len(pairs) < repeats and (len(pairs) < MIN_PAIRS or time.perf_counter() < end):
        sides = [("ours", lambda: jax.block_until_ready(case.ours())), ("peer", case.peer)]
        # The side that goes first changes: whatever one leaves in the caches helps or hurts both alike.
        pair = {name: _timed(side)[0] for name, side in (sides if len(pairs) % 2 else sides[::-1])}
        pairs.append((pair["ours"], pair["peer"]))
    wall, cpu = np.moveaxis(np.array(pairs), -1, 0)
    return Result(case, *wall.T, *cpu.T, *first, worst)


def _timed(run: Callable[[], Any]) -> tuple[tuple[float, float], Any]:
    """((seconds, processor seconds), what it returns)."""
    time.sleep(PAUSE)
    began, cpu = time.perf_counter(), time.process_time()
    out = run()
    return (time.perf_counter() - began, max(time.process_time() - cpu, 1e-9)), out


def relative_difference(ours: Any, peer: Any) -> float:
    """Largest difference over the peer's largest value; infinite when shapes differ or a value is not finite."""
    a, b = np.asarray(ours, np.float64), np.asarray(peer, np.float64)
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))


def unequal_share(ours: Any, peer: Any) -> float:
    """Share of entries that are not equal, for tokens; infinite when shapes differ."""
    a, b = np.asarray(ours), np.asarray(peer)
    return float((a != b).mean()) if a.shape == b.shape else float("inf")
