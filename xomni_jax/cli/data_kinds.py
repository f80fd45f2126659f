"""xomni data kinds: which files training can read."""

from __future__ import annotations

import argparse

NAME, HELP = "kinds", "which files of images, conversations and prompts can be read"
EXAMPLE = "xomni data kinds"
ABOUT = """\
Lists the kinds of files, each with a line of configuration. The kind is found by content and name; columns by their usual names, or those
of config.data.image and config.data.caption.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are no options."""


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Prints the table."""
    from xomni_jax.data.kinds import KINDS

    for name, kind in KINDS.items():
        print(f"{name}: {kind.files}\n    --config.data.source=files --config.data.path={kind.example}")
    print("For prompts without images: --config.data.source=prompts. A class of your own: --config.data.source=my_source.py:Class")
    return 0
