"""`xomni report RUN...`: training runs on one page."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = """\
xomni report runs/tiny/grpo
xomni report runs/tiny/sft runs/tiny/grpo --out runs/both.html"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Runs, output."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories of xomni train, shown over each other")
    parser.add_argument("--out", metavar="FILE", help="the page, which needs no other file (default: RUN/report.html of the first)")


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Writes the page; the last line says where."""
    from xomni_jax.evaluation.training_report import write_training_report

    out = Path(args.out) if args.out else Path(args.runs[0]) / "report.html"
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}; make it first, or give the directory of a run")
    print(f"{len(args.runs)} run{'s' * (len(args.runs) > 1)}, in {write_training_report(args.runs, out)}")
    return 0
