"""The card of a model that was made by a chain of runs: configs, seeds, commands, wall times and last metrics, read from the runs.

python -m xomni_jax.evaluation.card RUNS MODEL writes MODEL/CARD.md; run it where configs/ is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from xomni_jax.training.stage import load_config

STAGES = ("tokenizer", "decoder", "pretrain_1", "pretrain_2", "pretrain_3", "sft")
SHOWN = ("loss/total", "loss/image", "loss/text", "loss/flow", "accuracy/answer", "accuracy/dense", "codes/perplexity")


def run_row(run_dir: Path) -> dict[str, str]:
    """One stage's line: command, seed, steps, minutes spent in steps, last metrics."""
    config = json.loads((run_dir / "config.json").read_text())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = lines[-1]
    spent = sum(line.get("perf/seconds", 0.0) for line in lines)
    file = f"configs/tiny/{run_dir.name}.py"
    cut = f" --config.steps={config['steps']}" if load_config(file).steps != config["steps"] else ""
    return {
        "stage": run_dir.name,
        "command": f"`xomni train --config={file}{cut}`",
        "seed": str(config["seed"]),
        "steps": str(config["steps"]),
        "batch": str(config["batch_size"]),
        "minutes": f"{spent / 60:.1f}",
        "last metrics": ", ".join(f"{name} {last[name]:.4g}" for name in SHOWN if last.get(name) is not None),
    }


def card(runs: Path, model: Path) -> str:
    """The card's text. Raises ValueError when `runs` holds none of the stages."""
    description = json.loads((model / "model.json").read_text())
    rows = [run_row(runs / stage) for stage in STAGES if (runs / stage / "metrics.jsonl").is_file()]
    if not rows:
        raise ValueError(f"{runs} holds no runs; give the folder with {', '.join(STAGES)}")
    size = sum(f.stat().st_size for f in model.rglob("*") if f.is_file()) / 1e6
    head = "| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0])
    table = "\n".join("| " + " | ".join(row.values()) + " |" for row in rows)
    return (
        "# Tiny X-Omni, after supervised fine-tuning\n\n"
        "A real X-Omni with small numbers: the start of the demo's reinforcement learning. It draws signs of capital letters and simple\n"
        "shapes, and answers questions about them. Trained on the rendered data set of this package alone, no outside data.\n\n"
        f"Components: {', '.join(sorted(description['components']))}. Size on disk: {size:.1f} MB. Licence: Apache-2.0.\n\n"
        "## How it was made\n\n"
        "`bash launch/make_tiny.sh` runs these commands, each starting from the model of the one before (minutes are those of the steps, on\n"
        "two shared CPU cores; every run's whole configuration is in its `config.json`):\n\n"
        f"{head}\n{table}\n"
    )


def main(arguments: list[str]) -> None:
    """Writes the card of RUNS into MODEL."""
    runs, model = Path(arguments[0]), Path(arguments[1])
    (model / "CARD.md").write_text(card(runs, model))
    print(model / "CARD.md")


if __name__ == "__main__":
    main(sys.argv[1:])
