"""xomni inspect: what a checkpoint holds, and how two differ."""

from __future__ import annotations

import argparse
import logging

DETAILS = """\
PATH is a model directory or a published one (X-Omni, FLUX.1-dev, Qwen2.5, SigLIP2). Where a part of it is damaged, the exit code is 2.
With --diff the values of all parameters are compared; the exit code is 0 if all are equal and 1 if some differ, as with diff.
"""
EXAMPLE = """\
xomni inspect X-Omni-En
xomni inspect models/xomni --diff X-Omni-mine
xomni inspect xomni_jax/assets/tiny_sft"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's own options."""
    parser.add_argument("path", metavar="PATH")
    parser.add_argument("--diff", metavar="PATH2", help="compare with this checkpoint, tensor by tensor")


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Prints the description or the differences."""
    from xomni_jax.checkpoint.conversion import ConversionError
    from xomni_jax.checkpoint.inspection import compare, describe, open_view

    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of what is told here
    view = open_view(args.path)
    other, differing = view if args.diff is None else open_view(args.diff), 0
    if args.diff is None:
        for line in describe(view):
            print(line)
    if faults := {**view.faults, **other.faults}:
        raise ConversionError.of([f"{name}: {why}" for name, why in faults.items()])
    if args.diff is None:
        return 0
    for d in compare(view, other):
        differing += d.parameters
        measured = f"max abs {d.absolute:.3e}, relative {d.relative:.3e}, {d.count:,} values differ" if d.absolute == d.absolute else ""
        print(f"{d.name}: {'; '.join(filter(None, (measured, d.note)))}")
    total = sum(len({*view.arrays.get(c, {}), *other.arrays.get(c, {})}) for c in {*view.arrays, *other.arrays})
    print(f"{differing} of {total} parameters differ" if differing else f"all {total} parameters are equal")
    return int(differing > 0)
