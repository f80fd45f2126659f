"""xomni data fetch: what to download for a benchmark, and whether a directory holds it."""

from __future__ import annotations

import argparse
from pathlib import Path

NAME, HELP = "fetch", "what to download for a benchmark"
EXAMPLE = "xomni data fetch geneval --check DATA"
ABOUT = """\
Prints the names, sizes and checksums of a benchmark's files and the repositories that publish them; nothing is downloaded. Put the files
into one directory DATA, under the names that are printed, for xomni eval SUITE --data DATA. --check DATA compares what lies there, reads
it, and says what is missing.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's own options."""
    from xomni_jax.evaluation.suites import FURTHER, PUBLISHED

    known = (*PUBLISHED, *FURTHER)
    parser.add_argument("suite", choices=known, metavar="SUITE", help="one of " + ", ".join(known))
    parser.add_argument("--check", metavar="DATA", help="the directory to check")


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Prints the list, or what the directory holds."""
    from xomni_jax.evaluation.suite import SuiteError, check_images
    from xomni_jax.evaluation.suites import get_suite
    from xomni_jax.evaluation.suites.downloads import check, listing

    suite = get_suite(args.suite)
    if args.check is None:
        print("\n".join([f"{suite.title}: put these files into a directory DATA.", *listing(suite.downloads)]))
        print(f"then: xomni data fetch {args.suite} --check DATA")
        return 0
    if not Path(args.check).is_dir():
        raise SuiteError(f"the data directory {args.check} does not exist")
    print("\n".join(check(suite.downloads, Path(args.check), suite.folders)))
    items = suite.load(Path(args.check))
    check_images(items)
    of = f" of {suite.published}" if suite.published else ""
    print(f"{suite.title}: {len(items)}{of} items can be read in {args.check}")
    return 0
