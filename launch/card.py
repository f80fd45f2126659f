"""The model card of the tiny model: what it can do, as measured, and the commands, seeds, times and last metrics of its stages.

python -m launch.card check RUNS          says which stages were made with other settings than those of configs/tiny
python -m launch.card write RUNS MODEL    writes MODEL/CARD.md; RUNS/rendered holds the results of `xomni eval rendered`
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from xomni_jax.core.config import ConfigError
from xomni_jax.core.tables import markdown
from xomni_jax.data.rendered import QUESTIONS, shapes_prompt, sign_prompt
from xomni_jax.evaluation.grpo_run import read_run
from xomni_jax.training.run_directory import check_continues
from xomni_jax.training.stage import load_config

STAGES = ("tokenizer", "decoder", "pretrain_1", "pretrain_2", "pretrain_3", "sft")
SHOWN = ("loss/total", "loss/image", "loss/text", "loss/flow", "accuracy/answer", "accuracy/dense", "codes/perplexity")
SAMPLES = 32  # of each example
# The prompts that the READMEs print.
SIGNS = (("HELLO", "red"), ("OPEN", "green"), ("COFFEE", "red"), ("TEA", "blue"))
SHAPES = (("star", "green", 2, "white"), ("circle", "blue", 2, "white"))


def check(runs: Path) -> None:
    """Raises ConfigError for a finished stage that was made with other settings than its file's, or from another model than is there."""
    for stage in STAGES:
        directory, file = runs / stage, f"configs/tiny/{stage}.py"
        if not (directory / "model").is_dir():
            continue
        config = dataclasses.replace(load_config(file), run_dir=str(directory))
        check_continues(config)
        if (steps := json.loads((directory / "config.json").read_text())["steps"]) != config.steps:
            raise ConfigError(f"{directory} was made with {steps} steps, {file} says {config.steps}; delete the folder to make it anew")


def stage_row(directory: Path) -> dict[str, str]:
    """One stage's line of the table: column -> text."""
    run = read_run(directory)
    config, last = run.config, run.records[-1]
    return {
        "stage": directory.name,
        "command": f"`xomni train --config=configs/tiny/{directory.name}.py`",
        "seed": str(config["seed"]),
        "steps": str(config["steps"]),
        "batch": str(config["batch_size"]),
        "minutes": f"{sum(record.get('perf/seconds', 0.0) for record in run.records) / 60:.1f}",
        "last metrics": ", ".join(f"{name} {last[name]:.4g}" for name in SHOWN if last.get(name) is not None),
    }


def ability_rows(rendered: Path) -> Iterator[tuple[str, str, str]]:
    """(ability, share that is right, number of outputs) from the results of `xomni eval rendered`."""
    for suite in ("rendered-text", "rendered-shapes", "rendered-qa"):
        results = json.loads((rendered / suite / "results.json").read_text())
        for name, value in results["scores"].items():
            yield f"{results['title']}: {name}", f"{value:.3f}", str(results["counts"]["outputs"])
        for name, category in results["categories"].items():
            if suite != "rendered-text":  # whose categories are the colours of the signs
                yield f"{results['title']}: {name}", f"{category['score']:.3f}", str(category["items"])


def example_rows(model: Any) -> Iterator[tuple[str, str, str]]:
    """(prompt, share of samples drawn right, share whose text the model then reads right) of the READMEs' prompts."""
    from xomni_jax.rewards.services.ocr import OCRScorer
    from xomni_jax.rewards.services.shapes import ShapesScorer

    ocr, contours = OCRScorer(), ShapesScorer()
    wanted: list[tuple[str, Any, dict[str, Any]]] = [(sign_prompt(t, c), ocr, {"text": [t]}) for t, c in SIGNS]
    for shape, colour, count, ground in SHAPES:
        targets = {"shapes": [{"shape": shape, "colour": colour, "count": count}], "background": ground}
        wanted.append((shapes_prompt(shape, colour, count, ground), contours, targets))
    for prompt, scorer, targets in wanted:
        images = model.generate([prompt] * SAMPLES)
        right = [scorer.score_image(np.asarray(image), {"prompt": prompt, "targets": targets}).detail["exact"] for image in images]
        read = "–"
        if "text" in targets:
            answers = model.answer(model.encode(images), [QUESTIONS[0]] * SAMPLES)
            read = f"{np.mean([answer == targets['text'][0] for answer in answers]):.2f}"
        yield f"`{prompt}`", f"{np.mean(right):.2f}", read


def card(runs: Path, model: Path) -> str:
    """The card's text. Raises ValueError when `runs` holds none of the stages."""
    import xomni_jax

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

## What it can do

Share of right outputs on words and combinations of shapes that are in no training example, with the default sampling, measured by
`xomni eval rendered --model xomni_jax/assets/tiny_sft --out runs/tiny/rendered`:

{markdown([("ability", "right", "outputs"), *ability_rows(runs / "rendered")])}

The prompts that the READMEs print, {SAMPLES} samples each with the default sampling, and how many of the drawn signs the model itself
reads right ("{QUESTIONS[0]}"), measured by `python -m launch.card write`:

{markdown([("prompt", "drawn right", "read right"), *example_rows(xomni_jax.load(model))])}

## How it was made

`bash launch/make_tiny.sh` runs these commands, each starting from the model of the one before (minutes are those of the steps, on
cores that may have had other work as well; every run's whole configuration is in its `config.json`):

{markdown([list(rows[0]), *(list(row.values()) for row in rows)])}
"""


def main(arguments: list[str]) -> None:
    """`check` or `write`; exit code 2 with the sentence of what is wrong."""
    try:
        match arguments:
            case ["check", runs]:
                check(Path(runs))
            case ["write", runs, model]:
                (Path(model) / "CARD.md").write_text(card(Path(runs), Path(model)))
            case _:
                sys.exit(__doc__)
    except ValueError as e:
        print(e, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
