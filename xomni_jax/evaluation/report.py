"""report.html: what was measured, on one page that needs no other file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xomni_jax.evaluation.measurement import Measurement
from xomni_jax.evaluation.charts import Dot, Line, dot_chart, line_chart
from xomni_jax.evaluation.effect import Effect, Setting
from xomni_jax.evaluation.grpo_run import GRPORun
from xomni_jax.evaluation.markup import (
    decimal,
    document,
    facts_table,
    figure,
    image_data,
    interval,
    interval_text,
    percent,
    points,
    scroll,
    section,
    times,
    write_text,
)
from xomni_jax.evaluation.summary import SHOWN
from xomni_jax.rewards.text_metrics import is_exact

SETTING_NAMES = {"guidance_off": "Guidance off", "guidance_on": "Guidance on"}
METRIC_NAMES = {
    "ocr_reward": "OCR reward",
    "word_accuracy": "Word accuracy",
    "colour_accuracy": "Colour accuracy",
    "second_reader_accuracy": "Second reader",
}
SHOWN_PROMPTS, UNFOLDED_PROMPTS, SHOWN_SAMPLES = 12, 6, 4


def write_report(effect: Effect, report: dict[str, Any], path: str | Path) -> Path:
    """Writes the page and returns its path."""
    return write_text(path, page(effect, report))


def page(effect: Effect, report: dict[str, Any]) -> str:
    """The whole page as HTML."""
    config, names = effect.config, list(SETTING_NAMES)
    size = "x".join(map(str, config.size))
    body = [
        "<header><p class=over>X-Omni in JAX</p><h1>What reinforcement learning changed</h1>",
        f"<p class=lead>A supervised model (SFT) drew {config.prompts} held-out signs of {config.lengths[0]} to "
        f"{config.lengths[1]} characters at {size} pixels; then GRPO trained it for {report['grpo_steps']} steps on what text "
        "recognition reads in its decoded images, and the result (RL) drew the same signs. Every image below was read, measured "
        "and counted the same way, without choosing.</p></header>",
        headline(report),
        section("Word accuracy", "".join(figure(overview(report[n]), setting_title(n, config.guidance)) for n in names), "two"),
        before_and_after(effect),
        *(section(setting_title(n, config.guidance), setting_table(report, n)) for n in names),
        section("Training", training(effect.run), "two", "Per-step values of the run, faint, and their moving average."),
        section(
            "SFT by temperature",
            "".join(figure(sweep(report, n), setting_title(n, config.guidance)) for n in names),
            "two",
            sweep_text(report),
        ),
        section("Is the reward being gamed?", statistics_tables(report), "two", STATISTICS_TEXT),
        section("How it was measured", method(report)),
    ]
    return document("What reinforcement learning changed", "".join(body))


# ---- parts of the page ----
STATISTICS_TEXT = (
    "A second reader that took no part in training should agree; edge density and colour entropy should stay near those of the "
    "reconstructions; re-encode agreement says how many codes come back when an image is tokenised again."
)


def headline(report: dict[str, Any]) -> str:
    """The numbers one came for."""
    off = report["guidance_off"]
    comparison = report["comparisons"]["guidance_off"]
    ratio, best = (comparison["word_accuracy_ratio"][f"rl_to_{name}"] for name in ("sft", "sft_best_temperature"))
    colour = comparison["rl_minus"]["sft"]["colour_accuracy"]
    held = report["rl_holds_up_to_best_of"]
    verdict = {0: "not above one SFT sample", 1: "above one SFT sample"}.get(held, f"above best of {held}")
    beaten = comparison["rl_minus"]["sft" if held < 2 else f"sft_best_of_{held}"]["word_accuracy"]
    by = f"by {points(beaten['value'])} points ({interval_text(beaten['ci95'], 100, '+.0f')}); SFT's best is picked by an oracle"
    cards = [
        (
            "Words read right",
            f"{percent(off['sft']['word_accuracy'])} &rarr; {percent(off['rl']['word_accuracy'])}",
            "one SFT sample, one RL sample",
        ),
        ("RL over SFT", times(ratio["value"]), f"95% interval {interval_text(ratio['ci95'])}"),
        (
            "RL over SFT at its best temperature",
            times(best["value"]),
            f"temperature {comparison['sft_best_temperature']:g}" if comparison["sft_best_temperature"] is not None else "no sweep",
        ),
        ("One RL sample is", verdict, by),
        ("Colour", "not measured" if colour["value"] is None else f"{100 * colour['value']:+.1f} points", "RL minus SFT"),
    ]
    items = (f"<div class=card><p>{name}</p><strong>{value}</strong><small>{note}</small></div>" for name, value, note in cards)
    return f"<section class=headline>{''.join(items)}</section>"


def overview(rows: dict[str, Any]) -> str:
    """Word accuracy of every row."""
    series = lambda name: 1 if name == "rl" else 2 if name == "reconstruction" else 0  # noqa: E731
    return dot_chart(
        [Dot(row_title(n), e["word_accuracy"], *(e["ci95"]["word_accuracy"] or (None, None)), series(n)) for n, e in rows.items()]
    )


def setting_table(report: dict[str, Any], name: str) -> str:
    """All metrics with intervals, and RL's difference to each row."""
    head = "".join(f"<th>{METRIC_NAMES[m]}</th>" for m in SHOWN)
    rows = []
    for row, e in ({"real images": report["real_images"]} | report[name]).items():
        cells = "".join(f"<td>{decimal(e[m])}{interval(e['ci95'][m])}</td>" for m in SHOWN)
        difference = report["comparisons"][name]["rl_minus"].get(row, {}).get("word_accuracy")
        gain = "<td></td>" if difference is None else f"<td>{points(difference['value'])}{interval(difference['ci95'], 100, '+.0f')}</td>"
        rows.append(f"<tr class={'rl' if row == 'rl' else 'row'}><th>{row_title(row)}</th>{cells}{gain}</tr>")
    left_out = {row_title(row): n for row, n in report["prompts_left_out"][name].items() if n}
    note = "".join(f"<p class=note>{n} prompts have too few scored samples for {row}.</p>" for row, n in left_out.items())
    return (
        scroll(f"<table><thead><tr><th></th>{head}<th>RL minus row, words, points</th></tr></thead><tbody>{''.join(rows)}</tbody></table>")
        + note
    )


def training(run: GRPORun) -> str:
    """Curves of the run: rewards, KL, entropy, image statistics."""
    smooth = max(1, len(run.records) // 12)
    rewards = sorted({k.split("/")[1] for r in run.records for k in r if k.startswith("reward/") and k.endswith("/mean")} - {"total"})
    charts = {
        "Rewards": [Line(name, *run.curve(f"reward/{name}/mean"), smooth=smooth) for name in rewards],
        "KL to the SFT model": [Line("KL", *run.curve("grpo/kl"), smooth=smooth)],
        "Entropy of the policy": [Line("entropy", *run.curve("grpo/entropy"), smooth=smooth)],
        "Spread of rewards inside a group": [Line(name, *run.curve(f"reward/{name}/std"), smooth=smooth) for name in rewards],
        "Edge density": [Line("edge density", *run.curve("image/edge_density"), smooth=smooth)],
        "Colour entropy, bits": [Line("colour entropy", *run.curve("image/colour_entropy"), smooth=smooth)],
    }
    return "".join(figure(line_chart(lines, "step"), title) for title, lines in charts.items())


def sweep(report: dict[str, Any], name: str) -> str:
    """SFT's word accuracy by temperature, with RL's at the common temperature as a level."""
    entries = [e for e in report["sft_temperature_sweep"][name][::-1] if e["word_accuracy"] is not None]
    low, high = ([e["ci95"]["word_accuracy"][i] for e in entries] for i in (0, 1))
    line = Line("SFT", [e["temperature"] for e in entries], [e["word_accuracy"] for e in entries], low, high, dots=True)
    rl = report[name]["rl"]["word_accuracy"]
    return line_chart(
        [line], "temperature", (0.0, 1.0), None if rl is None else (f"RL, temperature {report['settings']['temperature']:g}", rl)
    )


def sweep_text(report: dict[str, Any]) -> str:
    """Which temperature was best."""
    said = []
    for name, title in SETTING_NAMES.items():
        best = report["comparisons"][name]["sft_best_temperature"]
        if best is not None:
            said.append(f"{title}: best at {best:g}.")
    return " ".join(said) + " The choice is made on these same prompts, which flatters SFT."


def before_and_after(effect: Effect) -> str:
    """The same prompts before and after, some unfolded, more to unfold, and all of them with guidance."""
    text = (
        "The first held-out prompts, not a selection, with guidance off. Under each image is what text recognition read in it, "
        f"green when right. Best of {effect.config.samples} is picked by the reward, an oracle."
    )
    more = grids(effect, "guidance_off", slice(UNFOLDED_PROMPTS, SHOWN_PROMPTS))
    more = f"<details><summary>More prompts</summary><div class=cards>{more}</div></details>" if more else ""
    guided = f"<details><summary>The same with guidance {effect.config.guidance:g}</summary><div class=cards>"
    guided += grids(effect, "guidance_on", slice(0, SHOWN_PROMPTS)) + "</div></details>"
    shown = f"<div class=cards>{grids(effect, 'guidance_off', slice(0, UNFOLDED_PROMPTS))}</div>"
    return section("Before and after", shown + more + guided, "", text)


def grids(effect: Effect, name: str, which: slice) -> str:
    """One card per prompt: reconstruction, SFT samples, the best of them, RL samples."""
    setting: Setting = effect.settings[name]
    selection_PR = setting.sft.selection(effect.run.weights)
    cards = []
    for p in range(len(effect.signs.captions))[which]:
        wanted = effect.signs.targets[p]["text"]
        picks = [int(np.nanargmax(selection_PR[p]))] if np.isfinite(selection_PR[p]).any() else []
        lines = [
            ("Real via codes", setting.reconstruction, [0]),
            (f"SFT, best of {effect.config.samples}", setting.sft, picks),
            ("SFT", setting.sft, range(min(SHOWN_SAMPLES, setting.sft.images.shape[1]))),
            ("RL", setting.rl, range(min(SHOWN_SAMPLES, setting.rl.images.shape[1]))),
        ]
        strips = [
            f"<div class=strip><h4>{title}</h4><div class=images>{''.join(image(cell, p, r, wanted) for r in samples)}</div></div>"
            for title, cell, samples in lines
        ]
        # The first two hold one image each and share a line.
        rows = f"<div class=pair>{''.join(strips[:2])}</div>{''.join(strips[2:])}"
        wide = effect.config.size[1] >= 3 * effect.config.size[0]
        cards.append(f"<article{' class=wide' * wide}><h3>{escape(effect.signs.captions[p])}</h3>{rows}</article>")
    return "".join(cards)


def image(cell: Measurement, p: int, r: int, wanted: Sequence[str]) -> str:
    """One image with what was read in it, marked when right."""
    text = str(cell.texts["ocr"][p, r])
    right = is_exact(list(wanted), text)
    mark, said = ("right", "&#10003; ") if right else ("wrong", "")
    width, data = cell.images.shape[3], image_data(Image.fromarray(cell.images[p, r]), "PNG", optimize=True)
    return (
        f'<figure class="{mark}"><img width="{2 * width}" alt="{escape(text) or "unread"}" src="{data}">'
        f"<figcaption>{said}{escape(text) or '&empty;'}</figcaption></figure>"
    )


def statistics_tables(report: dict[str, Any]) -> str:
    """Second reader and image statistics of every row."""
    heads = {
        "second_reader_accuracy": "Second reader",
        "edge_density": "Edge density",
        "colour_entropy": "Colour entropy",
        "reencode_agreement": "Re-encode",
    }
    out = []
    for name, title in SETTING_NAMES.items():
        head = "".join(f"<th>{h}</th>" for h in heads.values())
        rows = "".join(
            f"<tr class={'rl' if row == 'rl' else 'row'}><th>{row_title(row)}</th>"
            + "".join(f"<td>{decimal((e | report[name][row])[key], 1 if key == 'edge_density' else 2)}</td>" for key in heads)
            + "</tr>"
            for row, e in report["image_statistics"][name].items()
        )
        out.append(f"<div><h3>{title}</h3>{scroll(f'<table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>')}</div>")
    return "".join(out)


def method(report: dict[str, Any]) -> str:
    """Notes, times, failures, settings."""
    lines = "".join(f"<li>{escape(n)}</li>" for n in report["notes"])
    failed = {name: {k: n for k, n in e.items() if k != "images" and n} for name, e in report["failures"].items()}
    failed = {name: e for name, e in failed.items() if e}
    told = "; ".join(f"{name}: " + ", ".join(f"{n} by {k}" for k, n in e.items()) for name, e in failed.items()) or "none"
    times_ = {
        "first image": report["first_image_seconds"],
        "evaluation": report["evaluation_seconds"],
        "whole job": report["wall_seconds"],
    }
    times_ |= {f"step, {part}": value for part, value in report["step_seconds"].items()}
    facts = {f"{name}, s": decimal(value, 2) for name, value in times_.items() if value is not None}
    facts |= {"images not scored": told} | report["settings"]
    return f"<ul>{lines}</ul><details><summary>Settings and times</summary>{facts_table(facts)}</details>"


# ---- names ----
def setting_title(name: str, guidance: float) -> str:
    """Guidance off, or on with its value."""
    return SETTING_NAMES[name] + (f" ({guidance:g})" if name == "guidance_on" else "")


def row_title(row: str) -> str:
    """Name of a row for readers."""
    known = {"reconstruction": "Reconstruction", "sft": "SFT", "rl": "RL", "real images": "Real images"}
    return known.get(row) or "SFT best of " + row.rpartition("_")[2]
