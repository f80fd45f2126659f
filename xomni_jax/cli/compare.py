"""xomni compare: runs of one suite against each other, item by item."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = "xomni compare runs/sft runs/rl --out runs/rl/compared"
DETAILS = """\
Compares scored runs (directories of `xomni eval SUITE`) with the first of them: the headline of each, and the mean difference of the
items' scores with 95% bootstrap intervals, overall and per category. Runs of different suites or items are refused. A run whose headline
cannot be compared with published numbers says why.

With --out: OUT/compare.html (also the items that changed most, images side by side), OUT/compare.json (all numbers),
OUT/compare.csv (one line per item).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Runs, and where to write."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories; the first is what the others are compared with")
    parser.add_argument("--out", metavar="OUT", help="folder for the page, the numbers and the items; without it a table is printed")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap intervals (default 0)")


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Prints the table, writes the files."""
    from xomni_jax.evaluation.compare import compare, read_runs, table_text, write_comparison

    runs = read_runs(args.runs)
    comparison = compare(runs, args.seed)
    print(table_text(comparison))
    if args.out:
        print(f"report: {write_comparison(runs, comparison, Path(args.out)).absolute()}")
    else:
        print("pass --out OUT for a page with images, all numbers as JSON and a line per item as CSV")
    return 0
