"""Gathers what launch/claim.sh measured: few images and many prompts, three ways to go on from the best of fine-tuning.

python -m launch.claim OUT [FILE]    prints a table and writes it with all curves to FILE (default OUT/claim.json)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from launch.long_run import CURVES, METRICS
from xomni_jax.core.tables import aligned, format_estimate, format_number
from xomni_jax.evaluation.grpo_run import read_run

KINDS = {"short": "3 to 6 characters", "long": "12 to 16 characters"}
VALIDATION = "validation/loss/total"
ROWS = {  # row of the table: (which comparison, row of its report)
    "the best of fine-tuning": ("grpo", "sft"),
    "best of 16 of its samples": ("grpo", "sft_best_of_16"),
    "more fine-tuning on the same images": ("more", "rl"),
    "reinforcement learning on prompts": ("grpo", "rl"),
}


def collect(out: Path) -> dict[str, Any]:
    """Every evaluation's rows, differences with intervals, and the curves of every run under `out`."""
    evaluations = {}
    for path in sorted(out.glob("effect_*/report.json")):
        report = json.loads(path.read_text())
        rows = {row: {m: values[m] for m in (*METRICS, "ci95")} for row, values in report["guidance_off"].items()}
        evaluations[path.parent.name.removeprefix("effect_")] = {
            "rows": rows,
            "rl_minus": report["comparisons"]["guidance_off"]["rl_minus"],
        }
    names = {"sft": [VALIDATION], "more": [VALIDATION], "grpo": list(CURVES)}
    curves = {
        run.name: {name: [record.get(name) for record in read_run(run).records] for name in ("step", *names[run.name.split("_")[0]])}
        for run in sorted(path.parent for path in out.glob("*/metrics.jsonl"))
    }
    return {"evaluations": evaluations, "curves": curves}


def table(found: dict[str, Any], kind: str) -> str:
    """Words read exactly, of every seed that is finished; the last line is what RL has over the best of 16, with its 95% interval."""
    evaluations = found["evaluations"]
    seeds = [name.removeprefix(f"more_{kind}_") for name in evaluations if name.startswith(f"more_{kind}_")]
    of = lambda comparison, seed: evaluations[f"{comparison}_{kind}_{seed}"]
    rows = [(KINDS[kind], *(f"seed {seed}" for seed in seeds))]
    for name, (comparison, row) in ROWS.items():
        rows.append((name, *(format_number(of(comparison, seed)["rows"][row]["word_accuracy"], ".3f") for seed in seeds)))
    minus = [format_estimate(of("grpo", seed)["rl_minus"]["sft_best_of_16"]["word_accuracy"], "+.3f") for seed in seeds]
    rows.append(("RL minus best of 16", *(" ".join(estimate) for estimate in minus)))
    return aligned(rows)


def main(arguments: list[str]) -> None:
    """Prints the tables and writes the file."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.exit(__doc__)
    out = Path(arguments[0])
    found, file = collect(out), Path(arguments[1]) if arguments[1:] else out / "claim.json"
    file.write_text(json.dumps(found, separators=(",", ":"), sort_keys=True) + "\n")
    print("\n\n".join(table(found, kind) for kind in KINDS), f"\n{file}", sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
