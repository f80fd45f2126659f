"""xomni inspect: what a checkpoint holds, and how two differ."""

from __future__ import annotations

import argparse

DETAILS = """\
PATH is a model directory or a published one (X-Omni, FLUX.1-dev, Qwen2.5, SigLIP2). With --diff the values of all parameters are
compared; the exit code is 0 if all are equal and 1 if some differ, as with diff.
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
    from xomni_jax.checkpoint.inspection import compare, describe, open_view

    view = open_view(args.path)
    if args.diff is None:
        for line in describe(view):
            print(line)
        return 0
    other, differing = open_view(args.diff), 0
    for side in (view, other):
        for name, why in side.faults.items():
            raise ValueError(f"{name} cannot be compared: {why.splitlines()[0]}")
    for d in compare(view, other):
        differing += d.parameters
        measured = f"max abs {d.absolute:.3e}, relative {d.relative:.3e}, {d.count:,} values differ" if d.absolute == d.absolute else ""
        print(f"{d.name}: {'; '.join(filter(None, (measured, d.note)))}")
    total = sum(len({*view.arrays.get(c, {}), *other.arrays.get(c, {})}) for c in {*view.arrays, *other.arrays})
    print(f"{differing} of {total} parameters differ" if differing else f"all {total} parameters are equal")
    return int(differing > 0)
