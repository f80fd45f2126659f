"""xomni generate: images from prompts."""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path

from xomni_jax.cli.inference import add_drawing, add_model, opened

EXAMPLE = """xomni generate 'a red sign that says "HELLO"' 'two blue circles on white' --out images"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Prompts, size, sampling, output."""
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to draw; one image each")
    add_model(parser, "", "one device")
    add_drawing(parser)
    parser.add_argument("--seed", type=int, default=0, help="image i depends on the seed, i and its prompt alone (default 0)")
    parser.add_argument("--out", default="images", metavar="DIR", help="folder for the images (default: images)")


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Draws and saves; the last line says where."""
    began = time.perf_counter()
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    model = opened(args, rest)
    images = model.generate(
        args.prompts, args.height, args.width, args.seed, args.temperature, args.top_k, args.top_p, args.min_p, args.guidance
    )
    out.mkdir(parents=True, exist_ok=True)
    for i, (prompt, image) in enumerate(zip(args.prompts, images)):
        name = f"{i:03d}_{re.sub(r'[^A-Za-z0-9]+', '_', prompt).strip('_')[:60]}.png"
        image.save(out / name)
        print(out / name)
    size, seconds = f"{images[0].height}x{images[0].width}", time.perf_counter() - began
    print(f"{len(images)} image{'s' * (len(images) > 1)} of {size} in {seconds:.1f} s, in {out}")
    return 0
