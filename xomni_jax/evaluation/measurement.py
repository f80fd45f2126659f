"""The numbers of `xomni eval effect`: what is measured on P prompts x R images drawn one way, and report.json made of such measurements."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from xomni_jax.evaluation.statistics import (
    BEST_OF,
    best_of_weights,
    bootstrap_mean,
    bounds,
    held_up_to,
    number,
    paired_difference,
    paired_ratio,
    weighted_rows,
    with_bounds,
)
from xomni_jax.evaluation.suite import SuiteError

if TYPE_CHECKING:
    from xomni_jax.evaluation.effect import Effect, Setting

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
SHOWN = ("ocr_reward", "word_accuracy", "colour_accuracy", "second_reader_accuracy")


@dataclass
class Measurement:
    """P prompts x R images and what was measured.

    Attributes:
      images: uint8 [P, R, H, W, 3].
      metrics: name -> [P, R], NaN where unknown; those of services that were not asked are absent. Beside `METRICS`: edge_density and,
        for images made from codes, reencode_agreement.
      colours: share of pixels per colour [P, R, 64].
      texts: what each reader read, reader -> [P, R] of str.
      failures: service -> number of images that it could not score; they are NaN in its metrics.
    """

    images: np.ndarray
    metrics: dict[str, np.ndarray]
    colours: np.ndarray
    texts: dict[str, np.ndarray]
    failures: dict[str, int] = field(default_factory=dict)

    def selection(self, weights: Mapping[str, float]) -> np.ndarray:
        """The reward that best-of-N picks by [P, R]: weighted sum of the measured rewards, NaN where one of them failed.

        Raises:
          SuiteError: none of the weighted rewards was measured.
        """
        counted = {REWARDS[s]: w for s, w in weights.items() if w and REWARDS.get(s) in self.metrics}
        if not counted:
            raise SuiteError(
                f"none of the rewards that the run was trained on ({', '.join(weights) or 'none'}) was measured here; "
                "pass the URL of its service"
            )
        return sum(w * self.metrics[name] for name, w in counted.items())


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
    return Measurement(images, metrics, colour_histogram(images), texts, failures)


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


class Row(NamedTuple):
    """Images of a measurement with a weight each [P, R]: uniform, or the chance to be picked as the best of N."""

    measurement: Measurement
    weights_PR: np.ndarray

    def values(self, metric: str) -> np.ndarray:
        """Mean of a metric per prompt [P]; all NaN when it was not measured."""
        if metric not in self.measurement.metrics:
            return np.full(len(self.weights_PR), np.nan)
        return weighted_rows(self.measurement.metrics[metric], self.weights_PR)


def plain_row(measurement: Measurement) -> Row:
    """Every image counts alike."""
    return Row(measurement, np.ones(measurement.images.shape[:2]))


def setting_rows(setting: Setting, weights: dict[str, float]) -> dict[str, Row]:
    """The rows of one guidance setting: reconstruction, sft, sft_best_of_N as far as there are N samples, rl."""
    rows = {"reconstruction": plain_row(setting.reconstruction), "sft": plain_row(setting.sft)}
    selection_PR = setting.sft.selection(weights)
    for n in BEST_OF[1:]:
        if n <= selection_PR.shape[1]:
            rows[f"sft_best_of_{n}"] = Row(setting.sft, best_of_weights(selection_PR, n))
    return rows | {"rl": plain_row(setting.rl)}


def summarise(effect: Effect, seconds: dict[str, float | None]) -> dict[str, Any]:
    """report.json as a dict. Numbers that were not measured are null; `notes` says why."""
    config, weights = effect.config, effect.run.weights
    rows = {name: setting_rows(setting, weights) for name, setting in effect.settings.items()}
    comparisons = {name: compare(rows[name], effect.settings[name], config.seed) for name in rows}
    measurements = {"real": effect.real, "reconstruction": next(iter(effect.settings.values())).reconstruction}
    for name, setting in effect.settings.items():
        measurements |= {f"{name}/sft": setting.sft, f"{name}/rl": setting.rl}
        measurements |= {f"{name}/sft_temperature_{t:g}": m for t, m in setting.sweep.items() if m is not setting.sft}
    return {
        "heldout_prompts": config.prompts,
        "grpo_steps": effect.run.steps,
        **seconds,
        "step_seconds": effect.run.step_seconds(),
        **{name: {row: entry(r, config.seed) for row, r in rows[name].items()} for name in rows},
        "real_images": entry(plain_row(effect.real), config.seed),
        "rl_holds_up_to_best_of": comparisons["guidance_off"]["rl_holds_up_to_best_of"],
        "comparisons": comparisons,
        "sft_temperature_sweep": {
            name: [{"temperature": t, "samples": m.images.shape[1]} | entry(plain_row(m), config.seed) for t, m in setting.sweep.items()]
            for name, setting in effect.settings.items()
        },
        "image_statistics": {name: {row: image_entry(r) for row, r in rows[name].items()} for name in rows},
        "failures": {name: {"images": int(np.prod(m.images.shape[:2])), **m.failures} for name, m in measurements.items()},
        "prompts_left_out": {name: {row: int(np.isnan(r.weights_PR[:, 0]).sum()) for row, r in rows[name].items()} for name in rows},
        "settings": dataclasses.asdict(config) | {"selection_weights": {s: w for s, w in weights.items() if measured(effect.real, s)}},
        "prompts": list(effect.signs.captions),
        "notes": notes(effect),
    }


def entry(row: Row, seed: int) -> dict[str, Any]:
    """Means of the shown metrics over prompts, with `ci95`: metric -> [low, high]."""
    intervals = {metric: bootstrap_mean(row.values(metric), seed) for metric in SHOWN}
    return {metric: number(i.value) for metric, i in intervals.items()} | {"ci95": {metric: bounds(i) for metric, i in intervals.items()}}


def compare(rows: dict[str, Row], setting: Setting, seed: int) -> dict[str, Any]:
    """RL against the other rows on the same prompts; `rl_holds_up_to_best_of` goes by word accuracy, see `statistics.held_up_to`."""
    rl = rows["rl"]
    best_t, best = best_temperature(setting)
    others = {name: row for name, row in rows.items() if name != "rl"} | {"sft_best_temperature": plain_row(best)}
    words = {name: bootstrap_mean(row.values("word_accuracy")).value for name, row in rows.items()}
    best_of = {n: "sft" if n == 1 else f"sft_best_of_{n}" for n in BEST_OF}
    ratios = {
        name: paired_ratio(rl.values("word_accuracy"), others[name].values("word_accuracy"), seed)
        for name in ("sft", "sft_best_temperature")
    }
    return {
        "rl_holds_up_to_best_of": held_up_to(words["rl"], {n: words[name] for n, name in best_of.items() if name in words}),
        "sft_best_temperature": best_t,
        "word_accuracy_ratio": {f"rl_to_{name}": with_bounds(ratio) for name, ratio in ratios.items()},
        "rl_minus": {
            name: {metric: with_bounds(paired_difference(rl.values(metric), row.values(metric), seed)) for metric in SHOWN}
            for name, row in others.items()
        },
    }


def best_temperature(setting: Setting) -> tuple[float | None, Measurement]:
    """The temperature at which SFT reads right most often; (None, plain SFT) without a sweep."""
    means = {t: bootstrap_mean(plain_row(m).values("word_accuracy")).value for t, m in setting.sweep.items()}
    known = {t: mean for t, mean in means.items() if math.isfinite(mean)}
    if not known:
        return None, setting.sft
    best = max(known, key=known.__getitem__)
    return best, setting.sweep[best]


def image_entry(row: Row) -> dict[str, float | None]:
    """Edge density, colour entropy of the pooled images in bits, re-encode agreement, colour reward."""
    weights_PR = np.nan_to_num(row.weights_PR)
    share = (weights_PR[..., None] * row.measurement.colours).sum((0, 1)) / max(weights_PR.sum(), 1e-12)
    mean = lambda metric: number(bootstrap_mean(row.values(metric)).value)  # noqa: E731
    return {
        "edge_density": mean("edge_density"),
        "colour_entropy": colour_entropy(share),
        "reencode_agreement": mean("reencode_agreement"),
        "colour_reward": mean("colour_reward"),
    }


def notes(effect: Effect) -> list[str]:
    """What a reader has to know about the numbers, one sentence each."""
    config, run = effect.config, effect.run
    said = [
        "sft_best_of_N is an oracle: it picks with the reward that RL trains on, which knows the wanted text; no user has that.",
        f"Best-of-N is the mean over all subsets of {config.samples} samples per prompt; equal scores share the pick.",
        "The best temperature of SFT is chosen on these same prompts, which flatters SFT.",
        "An image that a service could not score is left out and counted under failures, never scored 0.",
        "All images of a prompt share one decoder noise; intervals are 95% bootstraps over prompts.",
        "step_seconds are medians; reward is the time still waited for after drawing, since scoring runs beside it.",
    ]
    if "second_reader_accuracy" not in effect.real.metrics:
        said.append("second_reader_accuracy is null: no second reader was given (--second).")
    if "colour_accuracy" not in effect.real.metrics:
        said.append("colour_accuracy is null: no shapes service was given (--shapes).")
    absent = [name for name in run.weights if not measured(effect.real, name)]
    if absent:
        said.append(f"The run was also trained on {', '.join(absent)}, not measured here and without part in best-of-N's choice.")
    return said


def measured(measurement: Measurement, service: str) -> bool:
    """Whether the reward of a service was measured."""
    return REWARDS.get(service) in measurement.metrics


def table_text(report: dict[str, Any]) -> str:
    """The numbers for a terminal: a table per guidance setting, the temperature sweeps, and the verdict."""
    heads = ("ocr", "words", "colour", "second reader")
    show = lambda v: "    -" if v is None else f"{v:5.3f}"  # noqa: E731
    lines = []
    for name in ("guidance_off", "guidance_on"):
        lines += [f"{name.replace('_', ' '):<18}" + "".join(f"{h:>22}" for h in heads)]
        for row, e in report[name].items():
            cells = [show(e[m]) + (f" [{show(e['ci95'][m][0])}, {show(e['ci95'][m][1])}]" if e["ci95"][m] else "") for m in SHOWN]
            lines.append(f"  {row:<16}" + "".join(f"{c:>22}" for c in cells))
        sweep = ", ".join(f"{e['temperature']:g}: {show(e['word_accuracy']).strip()}" for e in report["sft_temperature_sweep"][name])
        c = report["comparisons"][name]
        ratio, held = c["word_accuracy_ratio"]["rl_to_sft"]["value"], c["rl_holds_up_to_best_of"]
        times = "-" if ratio is None else f"{ratio:.2f}"
        lines.append(f"  SFT word accuracy by temperature: {sweep}")
        lines.append(f"  one RL sample reads right {times} times as often as one SFT sample; above best-of-N up to N = {held}")
        lines.append("")
    return "\n".join(lines)
