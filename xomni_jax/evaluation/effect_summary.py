"""report.json of `xomni eval effect`: what the measurements of one GRPO run say, with intervals, and the same for a terminal."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xomni_jax.checkpoint.store import write_json
from xomni_jax.core.tables import TableCell, aligned, format_estimate, format_interval, format_number
from xomni_jax.evaluation.effect import Effect, EffectConfig, Setting, measure_all
from xomni_jax.evaluation.grpo_run import read_run
from xomni_jax.evaluation.judges import RewardsJudge
from xomni_jax.evaluation.measurement import Measurement, colour_entropy
from xomni_jax.evaluation.statistics import (
    BEST_OF,
    bootstrap_mean,
    bounds,
    held_up_to,
    number,
    paired_difference,
    paired_ratio,
    with_bounds,
)

if TYPE_CHECKING:
    from xomni_jax.rewards.client import RewardClient

SETTING_NAMES = {"guidance_off": "Guidance off", "guidance_on": "Guidance on"}
ROW_NAMES = {"reconstruction": "Reconstruction", "sft": "SFT", "rl": "RL", "real images": "Real images"}
METRIC_NAMES = {
    "ocr_reward": "OCR reward",
    "word_accuracy": "Word accuracy",
    "colour_accuracy": "Colour accuracy",
    "second_reader_accuracy": "Second reader",
}


def run_effect(
    config: EffectConfig,
    clients: Mapping[str, RewardClient],
    versions: Mapping[str, str] | None = None,
    started: float | None = None,
    first_image_seconds: float | None = None,
) -> tuple[Effect, dict[str, Any]]:
    """Makes every measurement, or takes it from OUT/cells, and writes OUT/report.json. Returns what was measured and the report.

    Args:
      clients: role ("ocr", "shapes", "second") -> client; see `open_services`.
      versions: role -> version, so that everything is measured again after a service changed.
      started: time.time() at the beginning of the whole job, for wall_seconds; now by default.
      first_image_seconds: how long the first image took, to be reported.

    Raises:
      ValueError: a run, model or service that does not fit (`SuiteError`, `CheckpointError`), in one sentence.
    """
    began = time.time()
    effect = measure_all(config, read_run(config.rl_run), RewardsJudge(clients, versions or {}))
    seconds = {
        "first_image_seconds": first_image_seconds,
        "wall_seconds": time.time() - (began if started is None else started),
        "evaluation_seconds": time.time() - began,
    }
    report = summarise(effect, seconds)
    write_json(Path(config.out) / "report.json", report)
    return effect, report


def setting_rows(setting: Setting, weights: dict[str, float]) -> dict[str, Measurement]:
    """The rows of one guidance setting: reconstruction, sft, sft_best_of_N as far as there are N samples, rl."""
    selection_PR = setting.sft.selection(weights)
    best = {f"sft_best_of_{n}": setting.sft.best_of(n, selection_PR) for n in BEST_OF[1:] if n <= selection_PR.shape[1]}
    return {"reconstruction": setting.reconstruction, "sft": setting.sft, **best, "rl": setting.rl}


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
        "real_images": entry(effect.real, config.seed),
        "rl_holds_up_to_best_of": comparisons["guidance_off"]["rl_holds_up_to_best_of"],
        "comparisons": comparisons,
        "sft_temperature_sweep": {
            name: [{"temperature": t, "samples": m.images.shape[1]} | entry(m, config.seed) for t, m in setting.sweep.items()]
            for name, setting in effect.settings.items()
        },
        "image_statistics": {name: {row: image_entry(r) for row, r in rows[name].items()} for name in rows},
        "failures": {name: {"images": int(np.prod(m.images.shape[:2])), **m.failures} for name, m in measurements.items()},
        "prompts_left_out": {name: {row: int(np.isnan(r.weights_PR[:, 0]).sum()) for row, r in rows[name].items()} for name in rows},
        "settings": dataclasses.asdict(config) | {"selection_weights": effect.real.counted(weights)},
        "prompts": list(effect.signs.captions),
        "notes": notes(effect),
    }


def entry(row: Measurement, seed: int) -> dict[str, Any]:
    """Means of the shown metrics over prompts, with `ci95`: metric -> [low, high]."""
    intervals = {metric: bootstrap_mean(row.values(metric), seed) for metric in METRIC_NAMES}
    return {metric: number(i.value) for metric, i in intervals.items()} | {"ci95": {metric: bounds(i) for metric, i in intervals.items()}}


def compare(rows: dict[str, Measurement], setting: Setting, seed: int) -> dict[str, Any]:
    """RL against the other rows on the same prompts; `rl_holds_up_to_best_of` goes by word accuracy, see `statistics.held_up_to`."""
    rl = rows["rl"]
    best_t, best = best_temperature(setting)
    others = {name: row for name, row in rows.items() if name != "rl"} | {"sft_best_temperature": best}
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
            name: {metric: with_bounds(paired_difference(rl.values(metric), row.values(metric), seed)) for metric in METRIC_NAMES}
            for name, row in others.items()
        },
    }


def best_temperature(setting: Setting) -> tuple[float | None, Measurement]:
    """The temperature at which SFT reads right most often; (None, plain SFT) without a sweep."""
    means = {t: bootstrap_mean(m.values("word_accuracy")).value for t, m in setting.sweep.items()}
    known = {t: mean for t, mean in means.items() if math.isfinite(mean)}
    if not known:
        return None, setting.sft
    best = max(known, key=known.__getitem__)
    return best, setting.sweep[best]


def image_entry(row: Measurement) -> dict[str, float | None]:
    """Edge density, colour entropy of the pooled images in bits, re-encode agreement, colour reward."""
    weights_PR = np.nan_to_num(row.weights_PR)
    share = (weights_PR[..., None] * row.colours).sum((0, 1)) / max(weights_PR.sum(), 1e-12)
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
    if absent := run.weights.keys() - effect.real.counted(run.weights).keys():
        said.append(f"The run was also trained on {', '.join(sorted(absent))}, not measured here and without part in best-of-N's choice.")
    return said


# ---- for readers ----
def metrics_table(report: dict[str, Any], name: str) -> list[list[TableCell]]:
    """All metrics with intervals, and RL's difference to each row."""
    rows = [["", *METRIC_NAMES.values(), "RL minus row, words, points"]]
    for row, e in ({"real images": report["real_images"]} | report[name]).items():
        cells = [(format_number(e[metric], ".3f"), format_interval(e["ci95"][metric], ".2f")) for metric in METRIC_NAMES]
        rl_minus = report["comparisons"][name]["rl_minus"].get(row)
        rows.append([row_name(row), *cells, "" if rl_minus is None else format_estimate(rl_minus["word_accuracy"], "+.0f", 100)])
    return rows


def row_name(row: str) -> str:
    """What readers are told for a row of the report."""
    return ROW_NAMES.get(row) or "SFT best of " + row.removeprefix("sft_best_of_")


def settings_of(report: dict[str, Any]) -> dict[str, str]:
    """The guidance settings that were measured, with their titles."""
    return {name: title for name, title in SETTING_NAMES.items() if name in report}


def table_text(report: dict[str, Any]) -> str:
    """The numbers for a terminal: a table per guidance setting, SFT by temperature, and the verdict."""
    lines = []
    for name, title in settings_of(report).items():
        sweep = [f"{e['temperature']:g}: {format_number(e['word_accuracy'], '.3f')}" for e in report["sft_temperature_sweep"][name]]
        comparison = report["comparisons"][name]
        times = format_number(comparison["word_accuracy_ratio"]["rl_to_sft"]["value"], ".2f")
        lines += [title, aligned(metrics_table(report, name)), f"SFT word accuracy by temperature: {', '.join(sweep)}"]
        held = f"above best-of-N up to N = {comparison['rl_holds_up_to_best_of']}"
        lines += [f"one RL sample reads right {times} times as often as one SFT sample; {held}", ""]
    return "\n".join(lines)
