"""The long run's bookkeeping: how long the control trains, and one JSON of everything that was measured.

python -m xomni_jax.evaluation.long_run steps GRPO_RUN SPEED_RUN    prints the steps that take SPEED_RUN's stage as long as GRPO_RUN took
python -m xomni_jax.evaluation.long_run collect OUT FILE            gathers OUT/effect_*/report.json and the curves of OUT/grpo_* into FILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

CURVES = (
    "reward/total/mean",
    "reward/ocr/mean",
    "reward/shapes/mean",
    "grpo/kl",
    "grpo/entropy",
    "image/edge_density",
    "image/colour_entropy",
)
CELLS = ("reconstruction", "sft", "sft_best_of_2", "sft_best_of_4", "sft_best_of_8", "sft_best_of_16", "rl")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The logged steps of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def equal_steps(grpo: Path, speed: Path) -> int:
    """Steps of `speed`'s stage in the time `grpo` took; its first logged steps hold the compilation and do not count."""
    spent = sum(line["perf/seconds"] for line in read_metrics(grpo))
    return max(1, int(spent / np.median([line["perf/step_s"] for line in read_metrics(speed)[1:]])))


def collect(out: Path) -> dict[str, Any]:
    """Curves per training seed, and per evaluation word accuracy and OCR reward of every cell with the means over all of them."""
    effects = {path.parent.name.removeprefix("effect_"): json.loads(path.read_text()) for path in sorted(out.glob("effect_*/report.json"))}
    table: dict[str, Any] = {}
    for setting in ("guidance_off", "guidance_on"):
        for cell in CELLS:
            for metric in ("word_accuracy", "ocr_reward", "colour_accuracy", "second_reader_accuracy"):
                values = [e[setting][cell][metric] for name, e in effects.items() if name != "control"]
                known = [v for v in values if v is not None]
                table.setdefault(setting, {}).setdefault(cell, {})[metric] = float(np.mean(known)) if known else None
    return {
        "mean_over_seeds": table,
        "rl_holds_up_to_best_of": {name: e["rl_holds_up_to_best_of"] for name, e in effects.items()},
        "evaluations": {name: {s: e[s] for s in ("guidance_off", "guidance_on")} for name, e in effects.items()},
        "temperature_sweeps": {name: e["sft_temperature_sweep"] for name, e in effects.items()},
        "curves": {
            run.name: {name: [line.get(name) for line in read_metrics(run)] for name in ("step", *CURVES)}
            for run in sorted(out.glob("grpo_*"))
        },
    }


def main(arguments: list[str]) -> None:
    """`steps` or `collect`."""
    command, *rest = arguments
    if command == "steps":
        print(equal_steps(Path(rest[0]), Path(rest[1])))
    else:
        Path(rest[1]).write_text(
            json.dumps(collect(Path(rest[0])), separators=(",", ":"), sort_keys=True) + "\n"
        )  # curves: 18,000 lines otherwise
        print(rest[1])


if __name__ == "__main__":
    main(sys.argv[1:])
