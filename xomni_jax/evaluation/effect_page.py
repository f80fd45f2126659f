"""report.html of `xomni eval effect`: what RL changed, on one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xomni_jax.core.tables import TableCell, format_estimate, format_interval, format_number
from xomni_jax.evaluation.charts import Dot, Line, dot_chart, line_chart
from xomni_jax.evaluation.effect import Effect
from xomni_jax.evaluation.effect_summary import metrics_table, row_name, settings_of
from xomni_jax.evaluation.grpo_run import GRPORun
from xomni_jax.evaluation.item_cards import marked_differences
from xomni_jax.evaluation.measurement import Measurement
from xomni_jax.evaluation.pages import image_data, write_page
from xomni_jax.rewards.text_metrics import is_exact

STATISTIC_NAMES = {
    "second_reader_accuracy": "Second reader",
    "edge_density": "Edge density",
    "colour_entropy": "Colour entropy",
    "reencode_agreement": "Re-encode",
}
SHOWN_PROMPTS, SHOWN_SAMPLES = 12, 4


def write_report(effect: Effect, report: dict[str, Any], path: str | Path) -> Path:
    """Writes the page and returns its path."""
    config = effect.config
    settings = []
    for name, title in settings_of(report).items():
        title += f" ({config.guidance:g})" * (name == "guidance_on")
        settings.append(
            {
                "title": title,
                "overview": overview_chart(report[name], title),
                "metrics": metrics_table(report, name),
                "left_out": [(row_name(row), n) for row, n in report["prompts_left_out"][name].items() if n],
                "sweep": sweep_chart(report, name, title),
                "statistics": statistics_table(report, name),
            }
        )
    return write_page(
        path,
        "effect.html",
        config=config,
        report=report,
        cards=headline(report),
        settings=settings,
        training=training_charts(effect.run),
        curves=Path(path).with_name("training.html").is_file(),  # which launch/demo.sh wrote before
        sweep_note=sweep_note(report),
        without_guidance=prompts(effect, "guidance_off"),
        with_guidance=prompts(effect, "guidance_on") if "guidance_on" in report else [],
        wide=config.size[1] >= 3 * config.size[0],
        times_and_settings=times_and_settings(report),
    )


def headline(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The main numbers: name, value, note."""
    off, comparison = report["guidance_off"], report["comparisons"]["guidance_off"]
    ratio, best = (comparison["word_accuracy_ratio"][f"rl_to_{name}"] for name in ("sft", "sft_best_temperature"))
    times = lambda value: format_number(value) if value is None else f"{value:.2f}×"
    temperature = comparison["sft_best_temperature"]
    held = report["rl_holds_up_to_best_of"]
    verdict = {0: "not above one SFT sample", 1: "above one SFT sample"}.get(held, f"above best of {held}")
    beaten = comparison["rl_minus"]["sft" if held < 2 else f"sft_best_of_{held}"]["word_accuracy"]
    by, between = format_estimate(beaten, "+.0f", 100)
    unclear = ", no clear difference" if beaten["ci95"] and beaten["ci95"][0] <= 0 < held else ""
    accuracy = [format_number(off[row]["word_accuracy"], ".0%") for row in ("sft", "rl")]
    colour = comparison["rl_minus"]["sft"]["colour_accuracy"]["value"]
    return [
        ("Words read right", " → ".join(accuracy), "one SFT sample, one RL sample"),
        ("RL over SFT", times(ratio["value"]), f"95% interval {format_interval(ratio['ci95'], '.2f') or 'unknown'}"),
        (
            "RL over SFT at its best temperature",
            times(best["value"]),
            "no sweep" if temperature is None else f"temperature {temperature:g}",
        ),
        ("One RL sample is", verdict, f"by {by} points ({between or 'unknown'}{unclear}); SFT's best is picked by an oracle"),
        ("Colour", "not measured" if colour is None else f"{100 * colour:+.1f} points", "RL minus SFT"),
    ]


# ---- charts ----
def overview_chart(rows: dict[str, Any], title: str) -> str:
    """Word accuracy of every row."""
    series = {"rl": 1, "reconstruction": 2}
    ends = lambda e: e["ci95"]["word_accuracy"] or (None, None)
    return dot_chart(title, [Dot(row_name(row), e["word_accuracy"], *ends(e), series.get(row, 0)) for row, e in rows.items()])


def training_charts(run: GRPORun) -> dict[str, str]:
    """Title -> curves of the run: rewards, KL, entropy, image statistics; empty where nothing was logged."""
    rewards = sorted({k.split("/")[1] for r in run.records for k in r if k.startswith("reward/") and k.endswith("/mean")} - {"total"})
    curves = {
        "Rewards": {name: f"reward/{name}/mean" for name in rewards},
        "KL to the SFT model": {"KL": "grpo/kl"},
        "Entropy of the policy": {"entropy": "grpo/entropy"},
        "Spread of rewards inside a group": {name: f"reward/{name}/std" for name in rewards},
        "Edge density": {"edge density": "image/edge_density"},
        "Colour entropy, bits": {"colour entropy": "image/colour_entropy"},
    }
    smooth = max(1, len(run.records) // 12)
    return {
        title: line_chart(title, [Line(label, *run.curve(metric), smooth=smooth) for label, metric in metrics.items()], "step")
        for title, metrics in curves.items()
    }


def sweep_chart(report: dict[str, Any], name: str, title: str) -> str:
    """SFT's word accuracy by temperature, with RL's at the common temperature as a level."""
    entries = [e for e in reversed(report["sft_temperature_sweep"][name]) if e["word_accuracy"] is not None]
    low, high = ([e["ci95"]["word_accuracy"][i] for e in entries] for i in (0, 1))
    line = Line("SFT", [e["temperature"] for e in entries], [e["word_accuracy"] for e in entries], low, high, dots=True)
    rl = report[name]["rl"]["word_accuracy"]
    level = None if rl is None else (f"RL, temperature {report['settings']['temperature']:g}", rl)
    return line_chart(title, [line], "temperature", (0.0, 1.0), level)


def sweep_note(report: dict[str, Any]) -> str:
    """Which temperature was best."""
    best = {title: report["comparisons"][name]["sft_best_temperature"] for name, title in settings_of(report).items()}
    said = [f"{title}: best at {temperature:g}." for title, temperature in best.items() if temperature is not None]
    return " ".join([*said, "The choice is made on these same prompts, which flatters SFT."])


# ---- tables ----
def statistics_table(report: dict[str, Any], name: str) -> list[list[TableCell]]:
    """Second reader and image statistics of every row."""
    form = lambda key: ".1f" if key == "edge_density" else ".2f"
    rows = {row: e | report[name][row] for row, e in report["image_statistics"][name].items()}
    return [
        ["", *STATISTIC_NAMES.values()],
        *([row_name(row), *(format_number(e[key], form(key)) for key in STATISTIC_NAMES)] for row, e in rows.items()),
    ]


def times_and_settings(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Seconds spent, images that were not scored, and the settings."""
    seconds = {
        "first image": report["first_image_seconds"],
        "evaluation": report["evaluation_seconds"],
        "whole job": report["wall_seconds"],
    } | {f"step, {part}": value for part, value in report["step_seconds"].items()}
    failed = {name: [f"{n} by {k}" for k, n in counts.items() if k != "images" and n] for name, counts in report["failures"].items()}
    not_scored = "; ".join(f"{name}: {', '.join(counts)}" for name, counts in failed.items() if counts) or "none"
    text = lambda value: ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return [
        *((f"{name}, s", format_number(value, ".2f")) for name, value in seconds.items() if value is not None),
        ("images not scored", not_scored),
        *((name, text(value)) for name, value in report["settings"].items()),
    ]


# ---- images ----
def prompts(effect: Effect, name: str) -> list[dict[str, Any]]:
    """The first prompts, each with its reconstruction, SFT samples, the best of all of them, and RL samples."""
    setting = effect.settings[name]
    selection_PR = setting.sft.selection(effect.run.weights)
    shown = []
    for p, caption in enumerate(effect.signs.captions[:SHOWN_PROMPTS]):
        text = effect.signs.targets[p]["text"]
        best = [int(np.nanargmax(selection_PR[p]))] if np.isfinite(selection_PR[p]).any() else []
        samples = {"reconstruction": (setting.reconstruction, [0]), "best": (setting.sft, best)}
        samples |= {row: (cell, range(cell.images.shape[1])[:SHOWN_SAMPLES]) for row, cell in (("sft", setting.sft), ("rl", setting.rl))}
        shown.append({"caption": caption} | {row: signs(cell, p, which, text) for row, (cell, which) in samples.items()})
    return shown


def signs(cell: Measurement, p: int, which: Sequence[int], wanted: list[str]) -> dict[str, Any]:
    """Some images of a prompt with what was read in them, in the form of `item_cards.item_card`."""
    texts = [str(cell.texts["ocr"][p, r]) for r in which]
    datas = [image_data(Image.fromarray(cell.images[p, r]), optimize=True) for r in which]
    return {
        "id": wanted[0],
        "images": [{"data": data, "link": "", "boxes": []} for data in datas],
        "texts": [marked_differences(" ".join(wanted), text, fold_case=True) for text in texts],
        "verdicts": ["right" if is_exact(wanted, text) else "wrong" for text in texts],
        "answered": False,
    }
