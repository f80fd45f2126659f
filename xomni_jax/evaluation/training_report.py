"""The page of `xomni report`: training runs beside each other, from what their run directories hold, in one file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image

from xomni_jax.core.config import flat
from xomni_jax.evaluation.grpo_run import GRPORun, read_run
from xomni_jax.evaluation.pages import image_data, write_page
from xomni_jax.evaluation.suite import SuiteError

MAX_POINTS, MAX_GRIDS, MAX_SIDE = 2000, 40, 1600  # of a curve; grids of a run; pixels of a grid's longer side
MAX_EVENTS = 200  # of a run
# Shown first, where a run has them; the rest follows by name.
CHIEF = ("loss/total", "reward/total/mean", "loss/flow", "grpo/kl", "accuracy/answer", "optim/grad_norm", "perf/step_s", "perf/goodput")


def write_training_report(directories: Sequence[str | Path], path: str | Path) -> Path:
    """Writes the page and returns its path.

    Raises:
      SuiteError: a directory holds no training run, or two are called the same.
    """
    names = run_names(directories)
    runs = {name: read_run(directory) for name, directory in zip(names, directories, strict=True)}
    metrics = metric_names(list(runs.values()))
    curves = {m: {name: points for name, run in runs.items() if (points := thinned(run, m))} for m in metrics}
    grids = {name: images(Path(directory)) for name, directory in zip(names, directories)}
    return write_page(
        path,
        "training.html",
        title=f"Training of {', '.join(names)}",
        summary=summary(runs),
        data=json.dumps({"runs": names, "curves": curves}).replace("<", "\\u003c"),
        grids={name: found for name, found in grids.items() if found},
        differences=differences({name: run.config for name, run in runs.items()}),
        events={name: events(Path(directory), runs[name]) for name, directory in zip(names, directories)},
    )


def run_names(directories: Sequence[str | Path]) -> list[str]:
    """A short name of each run: the last parts of its path that tell it from the others."""
    parts = [Path(directory).resolve().parts for directory in directories]
    if len(set(parts)) < len(parts):
        raise SuiteError("a run is given twice; give each once")
    depth = next(n for n in range(1, max(map(len, parts)) + 1) if len({p[-n:] for p in parts}) == len(parts))
    return ["/".join(p[-depth:]) for p in parts]


def metric_names(runs: Sequence[GRPORun]) -> list[str]:
    """Everything that was logged, the chief ones first."""
    found = {name for run in runs for record in run.records for name in record} - {"step"}
    return [name for name in CHIEF if name in found] + sorted(found - set(CHIEF))


def thinned(run: GRPORun, metric: str) -> list[list[float]]:
    """[step, value] of a metric, at most `MAX_POINTS` of them: of more the mean of as many neighbours as needed."""
    steps, values = run.curve(metric)
    width = -(-len(steps) // MAX_POINTS) or 1
    return [[int(steps[i : i + width][-1]), float(f"{values[i : i + width].mean():.6g}")] for i in range(0, len(steps), width)]


def images(directory: Path) -> list[tuple[int, str, str]]:
    """(step, image as data: URL, its captions) of the grids of a run; of many the first, the last, and some between."""
    files = sorted((directory / "images").glob("step_*.png"))
    if len(files) > MAX_GRIDS:
        files = [files[round(i * (len(files) - 1) / (MAX_GRIDS - 1))] for i in range(MAX_GRIDS)]
    found = []
    for file in files:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        notes = file.with_suffix(".jsonl")
        lines = [json.loads(line) for line in notes.read_text().splitlines()] if notes.is_file() else []
        captions = "\n".join(" · ".join(str(value) for value in line.values()) for line in lines)
        found.append((int(file.stem.removeprefix("step_")), image_data(image, "WEBP", quality=85), captions))
    return found


def summary(runs: dict[str, GRPORun]) -> list[Sequence[str]]:
    """A row per run: its length, speed and last values."""
    rows: list[Sequence[str]] = [("run", "stage", "steps", "seconds a step", "goodput", "last loss", "last reward")]

    def last(run: GRPORun, *names: str) -> str:
        curves = [run.curve(name)[1] for name in names]
        return next((f"{values[-1]:.4g}" for values in curves if len(values)), "")

    for name, run in runs.items():
        seconds = run.curve("perf/step_s")[1]
        middle = f"{sorted(seconds)[len(seconds) // 2]:.3g}" if len(seconds) else ""
        stage = str(run.config.get("stage", ""))
        losses = last(run, "loss/total", "loss/flow", "loss/grpo")
        rows.append((name, stage, str(run.steps), middle, last(run, "perf/goodput"), losses, last(run, "reward/total/mean")))
    return rows


def differences(configs: dict[str, dict[str, Any]]) -> list[Sequence[str]]:
    """A row per key in which the runs' configurations differ; [] where they agree or there is one run."""
    values = {name: flat(config) for name, config in configs.items()}
    keys = sorted({key for config in values.values() for key in config})
    shown = lambda config, key: json.dumps(config[key], ensure_ascii=False) if key in config else "–"
    rows = [(key, *(shown(config, key) for config in values.values())) for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    return [("key", *values), *rows] if rows else []


def events(directory: Path, run: GRPORun) -> list[Sequence[str]]:
    """(step, what happened): starts, skipped steps, rewards that failed, metrics that were not finite."""
    found: list[tuple[float, str, str]] = []
    starts = sorted(int(file.name.split(".")[3]) for file in (directory / "tensorboard").glob("events.out.tfevents.*"))
    for n, at in enumerate(starts):
        found.append((-1, "", f"{'started' if n == 0 else 'started again'} at {datetime.fromtimestamp(at):%Y-%m-%d %H:%M:%S}"))
    if (skipped := directory / "skipped.jsonl").is_file():
        for line in map(json.loads, skipped.read_text().splitlines()):
            text = f"skipped: gradient norm {line['grad_norm']}; examples {', '.join(line['ids'][:4])}"
            found.append((line["step"], str(line["step"]), text))
    for record in run.records:
        step = record["step"]
        for name, value in record.items():
            if name.endswith("/fail_frac") and value:
                found.append((step, str(step), f"{name.split('/')[1]} could not score {value:.1%} of the images"))
            if value is None:
                found.append((step, str(step), f"{name} was not finite"))
    found.sort(key=lambda event: event[0])
    more = [("", f"and {len(found) - MAX_EVENTS} more")] if len(found) > MAX_EVENTS else []
    return [("step", "event"), *(event[1:] for event in found[:MAX_EVENTS]), *more]
