"""xomni eval judge-check: does a judge agree with known answers?"""

from __future__ import annotations

import argparse
from typing import Any

from xomni_jax.cli.eval_suite import add_command
from xomni_jax.evaluation.judges import HELP

NAME = "judge-check"
_ABOUT = """\
Asks a judge about images that are rendered here and whose answers are known: signs for ocr, shapes for vqa, a stop sign, a clock and a
traffic light for detector. Prints every answer and ends with exit code 1 if fewer than four in five are right: then the service has
another model than it should, cannot see the images, or replies in a form that cannot be read. It does not tell how good a judge is.
"""
EXAMPLE = "xomni eval judge-check ocr"


def add_check(kinds: Any) -> None:
    """The subcommand."""
    sub = add_command(kinds, NAME, "does a judge agree with known answers?", _ABOUT, EXAMPLE)
    sub.add_argument("kind", choices=("ocr", "vqa", "detector"), help="what the judge does")
    sub.add_argument("--judge", metavar="JUDGE", help="; ".join(f"{kind}: {HELP[kind]}" for kind in ("ocr", "vqa", "detector")))


def run(args: argparse.Namespace) -> int:
    """Prints the answers; exit code 1 when too few are right."""
    from xomni_jax.evaluation.judge_check import LEAST, check
    from xomni_jax.evaluation.judges import open_judge

    judge = open_judge(args.kind, args.judge)
    try:
        checked = check(args.kind, judge)
    finally:
        judge.close()
    for one in checked:
        print(f"{'right' if one.right else 'WRONG'}: wanted {one.known.wanted!r}, the judge says {str(one.reply)[:100]!r}")
    right = sum(one.right for one in checked)
    agrees = right >= LEAST * len(checked)
    print(f"{judge.name} {'agrees' if agrees else 'does not agree'} with the known answers: {right} of {len(checked)} are right")
    return 0 if agrees else 1
