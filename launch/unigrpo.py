"""The table of launch/unigrpo.sh.

python -m launch.unigrpo OUT FILE    prints rewards of OUT/{both,transformer,mmdit}_SEED and writes their curves to FILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from xomni_jax.core.tables import aligned
from xomni_jax.evaluation.grpo_run import read_run

VARIANTS = ("both", "transformer", "mmdit")
CURVES = ("reward/total/mean", "reward/ocr/mean", "reward/shapes/mean", "grpo/kl", "flow/penalty", "flow/clip_frac", "image/colour_entropy")
LAST = 10  # steps whose mean is compared


def collect(out: Path) -> dict[str, dict[str, list[Any]]]:
    """{run: {metric: curve}}; the runs of a seed have the same prompts."""
    return {
        run.name: {name: [record.get(name) for record in read_run(run).records] for name in ("step", *CURVES)}
        for name in VARIANTS
        for run in sorted(out.glob(f"{name}_*"))
        if (run / "model").is_dir()
    }


def table(curves: dict[str, dict[str, list[Any]]]) -> str:
    """Means of the first and of the last steps of every run."""
    shown = {
        f"reward, first {LAST}": ("reward/total/mean", slice(LAST)),
        f"last {LAST}": ("reward/total/mean", slice(-LAST, None)),
        "OCR, last": ("reward/ocr/mean", slice(-LAST, None)),
        "entropy of colours, first": ("image/colour_entropy", slice(LAST)),
        "last": ("image/colour_entropy", slice(-LAST, None)),
    }
    rows = [(name, *(f"{np.mean(curve[metric][part]):.4f}" for metric, part in shown.values())) for name, curve in curves.items()]
    return aligned([("run", *shown), *rows])


def main(arguments: list[str]) -> None:
    """See the module."""
    if len(arguments) != 2:
        sys.exit(__doc__)
    curves = collect(Path(arguments[0]))
    print(table(curves))
    Path(arguments[1]).write_text(json.dumps(curves, separators=(",", ":"), sort_keys=True) + "\n")
    print(arguments[1])


if __name__ == "__main__":
    main(sys.argv[1:])
