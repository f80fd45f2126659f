"""The model card of a model trained in several stages: commands, seeds, times and last metrics, read from the runs.

python -m launch.card RUNS MODEL writes MODEL/CARD.md; run it where configs/ is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from xomni_jax.core.tables import markdown
from xomni_jax.evaluation.grpo_run import read_run
from xomni_jax.training.stage import load_config

STAGES = ("tokenizer", "decoder", "pretrain_1", "pretrain_2", "pretrain_3", "sft")
SHOWN = ("loss/total", "loss/image", "loss/text", "loss/flow", "accuracy/answer", "accuracy/dense", "codes/perplexity")


def stage_row(directory: Path) -> dict[str, str]:
    """One stage's line of the table: column -> text."""
    run = read_run(directory)
    config, last = run.config, run.records[-1]
    file = f"configs/tiny/{directory.name}.py"
    shortened = f" --config.steps={config['steps']}" if load_config(file).steps != config["steps"] else ""
    return {
        "stage": directory.name,
        "command": f"`xomni train --config={file}{shortened}`",
        "seed": str(config["seed"]),
        "steps": str(config["steps"]),
        "batch": str(config["batch_size"]),
        "minutes": f"{sum(record.get('perf/seconds', 0.0) for record in run.records) / 60:.1f}",
        "last metrics": ", ".join(f"{name} {last[name]:.4g}" for name in SHOWN if last.get(name) is not None),
    }


def card(runs: Path, model: Path) -> str:
    """The card's text. Raises ValueError when `runs` holds none of the stages."""
    components = json.loads((model / "model.json").read_text())["components"]
    rows = [stage_row(runs / stage) for stage in STAGES if (runs / stage / "metrics.jsonl").is_file()]
    if not rows:
        raise ValueError(f"{runs} holds no runs; give the folder with {', '.join(STAGES)}")
    size = sum(f.stat().st_size for f in model.rglob("*") if f.is_file()) / 1e6
    return f"""\
# Tiny X-Omni, after supervised fine-tuning

A real X-Omni with small numbers: the start of the demo's reinforcement learning. It draws signs of capital letters and simple
shapes, and answers questions about them. Trained on the rendered data set of this package alone, no outside data.

Components: {", ".join(sorted(components))}. Size on disk: {size:.1f} MB. Licence: Apache-2.0.

## How it was made

`bash launch/make_tiny.sh` runs these commands, each starting from the model of the one before (minutes are those of the steps, on
two shared CPU cores; every run's whole configuration is in its `config.json`):

{markdown([list(rows[0]), *(list(row.values()) for row in rows)])}
"""


def main(arguments: list[str]) -> None:
    """Writes the card of RUNS into MODEL."""
    runs, model = Path(arguments[0]), Path(arguments[1])
    (model / "CARD.md").write_text(card(runs, model))
    print(model / "CARD.md")


if __name__ == "__main__":
    main(sys.argv[1:])
