"""The table of metrics in configs/README.md names what runs write, and nothing else."""

import json
import re

import pytest

from tests.miniature import ROOT

SECTION = (ROOT / "configs" / "README.md").read_text().split("## Metrics")[1].split("\n## ")[0]
ROWS = [row.split("|")[1:4] for row in SECTION.splitlines() if row.startswith("| `")]
TABLE = {(stage.strip(), name) for names, stages, _ in ROWS for stage in stages.split(",") for name in re.findall("`(.+?)`", names)}
STAGE_OF = {"pretrain_1": "pretrain"}


def documented(stage):
    """Names of a stage's metrics; a reward's own name stands as NAME."""
    return {name for of, name in TABLE if of in (stage, "all")}


def generic(names):
    """Names as the table has them."""
    return {re.sub(r"^reward/(?!total/)\w+/", "reward/NAME/", name) for name in names}


@pytest.mark.parametrize("case", ["tokenizer", "decoder", "pretrain_1", "sft", "grpo"])
def test_the_table_is_what_a_run_of_each_stage_wrote(case):
    """The recorded runs, which tests/behaviour checks against the code; times and memory are not recorded."""
    rows = json.loads((ROOT / "tests" / "behaviour" / "goldens" / f"{case}.json").read_text())["found"]["metrics"]
    written = generic(name for row in rows for name in row)
    listed = documented(STAGE_OF.get(case, case))
    # None of these runs has a mixture (training/test_mixture.py), a validation (training/test_validation.py), images without a score, a
    # reader that says what it read, a tokenizer that sees the images again, or an option that adds metrics of its own.
    begins = (
        "perf/",
        "memory/",
        "guard/",
        "validation/",
        "text/",
        "control/",
        "rollout/",
        "loss/sft",
        "grpo/sampler_kl",
        "grpo/importance_",
    )
    ends = ("/SOURCE", "/failed_KIND", "/reencode_frac")
    sometimes = lambda name: name.startswith(begins) or name.endswith(ends)  # noqa: E731
    assert written == {name for name in listed if not sometimes(name)}
