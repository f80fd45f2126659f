"""xomni data check: what training would refuse of your files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xomni_jax.cli.data_config import with_data
from xomni_jax.core.config import ConfigError, merge_overrides, read_overrides
from xomni_jax.core.folders import check_folder, write_text

if TYPE_CHECKING:
    from xomni_jax.data.sources import DataSection

NAME, HELP = "check", "read everything once: what training would refuse, and why"
EXAMPLE = 'xomni data check my_images "shards/*.tar" --out=faults.jsonl'
ABOUT = """\
Reads every record with its images and prints how many can be used, the reasons of the others with examples, repeated records, and files
without records. The data are those of a configuration, or PATHs with options such as --config.data.caption=COLUMN. The exit code is 1
when something would be refused.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's own options."""
    parser.add_argument("path", nargs="*", metavar="PATH", help="files, folders or globs; xomni data kinds lists what can be read")
    parser.add_argument("--config", metavar="FILE", help="a configuration of training, whose data are checked")
    parser.add_argument("--prompts", action="store_true", help="the PATHs hold prompts for reinforcement learning, which need no images")
    parser.add_argument("--out", metavar="FILE", help="write everything that is found here, as JSON lines")


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Prints what was found."""
    from xomni_jax.data.check import check
    from xomni_jax.data.files import FilesConfig
    from xomni_jax.evaluation.held_out import with_benchmarks

    if bool(args.path) == bool(args.config):
        raise ConfigError("give one or more PATHs, or --config=FILE with the data of a training")
    if args.out:
        check_folder(Path(args.out).parent, 0)
    data = with_data(args.config, rest).data if args.config else with_benchmarks(_named(args, rest))
    parts = [part for part in data.parts if isinstance(part.options, FilesConfig)]
    if not parts:
        raise ConfigError(f"config.data.source={data.source}: its examples are not read from files; nothing is to be checked")
    checked = [check(part.options, part.source == "prompts") for part in parts]
    for part, found in zip(parts, checked, strict=True):
        print("\n".join([f"config.data.path={part.options.path}:", *found.lines()] if data.names else found.lines()))
    if args.out:
        rows = (json.dumps(row, ensure_ascii=False) + "\n" for found in checked for row in found.rows())
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(args.out), "".join(rows))
    return 1 if any(found.skipped or not found.records for found in checked) else 0


def _named(args: argparse.Namespace, rest: list[str]) -> DataSection:
    from xomni_jax.data.rendered import SIGNS

    changes: dict[str, Any] = {"data": {}}
    merge_overrides(changes, read_overrides(rest))
    source = {"source": "prompts" if args.prompts else "files", "path": tuple(args.path), "sizes": ((1, 1),)}
    return SIGNS.updated(source | changes["data"], "config.data")
