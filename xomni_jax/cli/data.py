"""xomni data: sets of images, what can be read and what is wrong with it, a look at it, codes made of it; files of benchmarks."""

from __future__ import annotations

import argparse
import sys
import textwrap

from xomni_jax.cli import data_check, data_fetch, data_inspect, data_kinds, data_make, data_tokenize

COMMANDS = {module.NAME: module for module in (data_make, data_kinds, data_check, data_inspect, data_tokenize, data_fetch)}
EXAMPLE = data_fetch.EXAMPLE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A subcommand for each of `COMMANDS`; only the wanted one adds its options."""
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, module in COMMANDS.items():
        sub = what.add_parser(name, help=module.HELP, description=module.ABOUT)
        sub.epilog = "example:\n" + textwrap.indent(module.EXAMPLE, "  ")
        if name in sys.argv[2:]:
            module.add_arguments(sub)


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Runs the subcommand."""
    return COMMANDS[args.what].run(args, rest)
