"""Helpers of launch/long_run.sh: how many steps the control run makes, and one JSON file with all its measurements.

python -m launch.long_run steps GRPO_RUN SPEED_RUN    prints the steps that take SPEED_RUN's stage as long as GRPO_RUN took
python -m launch.long_run collect OUT FILE            gathers OUT/effect_*/report.json and the curves of OUT/grpo_* into FILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from xomni_jax.evaluation.grpo_run import read_run

CURVES = (
    "reward/total/mean",
    "reward/ocr/mean",
    "reward/shapes/mean",
    "grpo/kl",
    "grpo/entropy",
    "image/edge_density",
    "image/colour_entropy",
)
SETTINGS = ("guidance_off", "guidance_on")
METRICS = ("word_accuracy", "ocr_reward", "colour_accuracy", "second_reader_accuracy")
ROWS = ("reconstruction", "sft", "sft_best_of_2", "sft_best_of_4", "sft_best_of_8", "sft_best_of_16", "rl")


def equal_steps(grpo: Path, speed: Path) -> int:
    """Steps that the stage of the run `speed` makes in the time that the run `grpo` took."""
    spent = sum(record["perf/seconds"] for record in read_run(grpo).records)
    step_seconds = read_run(speed).curve("perf/step_s")[1]
    return max(1, int(spent / np.median(step_seconds[1:])))  # the first logged steps hold the compilation


def collect(out: Path) -> dict[str, Any]:
    """Curves per training seed, and the rows of every evaluation with their means over the seeds."""
    effects = {path.parent.name.removeprefix("effect_"): json.loads(path.read_text()) for path in sorted(out.glob("effect_*/report.json"))}
    of_seeds = [effect for name, effect in effects.items() if name != "control"]

    def mean(setting: str, row: str, metric: str) -> float | None:
        known = [effect[setting][row][metric] for effect in of_seeds if effect[setting][row][metric] is not None]
        return float(np.mean(known)) if known else None

    return {
        "mean_over_seeds": {s: {row: {metric: mean(s, row, metric) for metric in METRICS} for row in ROWS} for s in SETTINGS},
        "rl_holds_up_to_best_of": {name: e["rl_holds_up_to_best_of"] for name, e in effects.items()},
        "evaluations": {name: {s: e[s] for s in SETTINGS} for name, e in effects.items()},
        "temperature_sweeps": {name: e["sft_temperature_sweep"] for name, e in effects.items()},
        "curves": {
            run.name: {name: [record.get(name) for record in read_run(run).records] for name in ("step", *CURVES)}
            for run in sorted(out.glob("grpo_*"))
        },
    }


def main(arguments: list[str]) -> None:
    """`steps` or `collect`."""
    match arguments:
        case ["steps", grpo, speed]:
            print(equal_steps(Path(grpo), Path(speed)))
        case ["collect", out, file]:
            # On one line: with indentation the curves would take 18,000.
            Path(file).write_text(json.dumps(collect(Path(out)), separators=(",", ":"), sort_keys=True) + "\n")
            print(file)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
