"""xomni eval: the paper's benchmarks, and studies of what reinforcement learning and guidance change."""

from __future__ import annotations

import argparse
import sys
import textwrap

from xomni_jax.cli import eval_judge, eval_study, eval_suite
from xomni_jax.core.registry import RegistryError
from xomni_jax.evaluation.suite import SuiteError
from xomni_jax.evaluation.suites import FURTHER, GROUPS, SUITES

EXAMPLE = eval_suite.EXAMPLE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A subcommand per suite, group of suites and study; only the wanted one is imported, or all of them for --help."""
    parser.add_argument("--paper-table", action="store_true", help="print the command behind each number of the paper's tables 1 to 4")
    parser.add_argument("--runs", metavar="DIR", help="with --paper-table: also print these finished runs")
    parser.details = textwrap.fill("Further suites, of related systems: " + ", ".join(FURTHER), 80, break_on_hyphens=False)
    more = f"--help-all names {len(FURTHER)} further suites"
    kinds = parser.add_subparsers(dest="evaluation", metavar="WHAT", title="suites and studies", description=more)
    others = (*eval_study.STUDIES, eval_judge.NAME)
    known = (*SUITES.names(), *GROUPS, *others)
    wanted = next((word for word in sys.argv[2:] if word in known or ".py:" in word), None)
    try:
        if wanted not in others:
            eval_suite.add_suites(kinds, wanted)
    except (SuiteError, RegistryError) as e:
        parser.exit(2, f"xomni eval: {e}\n")
    eval_study.add_studies(kinds, wanted)
    eval_judge.add_check(kinds)


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Runs the evaluation that was asked for."""
    if args.paper_table:
        from xomni_jax.evaluation.paper import find_runs, table_text

        print(table_text(find_runs(args.runs) if args.runs else ()))
        return 0
    if args.evaluation is None:
        raise ValueError("say what to evaluate, such as rendered-text, or give --paper-table; xomni eval --help lists all")
    if args.evaluation == eval_judge.NAME:
        return eval_judge.run(args)
    return eval_study.run(args) if args.evaluation in eval_study.STUDIES else eval_suite.run(args, rest)
