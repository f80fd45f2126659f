"""xomni generate: images from prompts."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from xomni_jax.cli.inference import add_adapter, add_drawing, add_model, opened
from xomni_jax.core.folders import check_folder

if TYPE_CHECKING:
    from PIL import Image

EXAMPLE = """xomni generate 'a red sign that says "HELLO"' 'two blue circles on white' --out images"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Prompts, size, sampling, output."""
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to draw; one image each")
    add_model(parser, "", "one device")
    add_adapter(parser)
    add_drawing(parser)
    parser.add_argument("--seed", type=int, default=0, help="image i depends on the seed, i and its prompt alone (default 0)")
    parser.add_argument("--out", default="images", metavar="DIR", help="folder for the images (default: images)")


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Draws and saves; the last line says where."""
    began = time.perf_counter()
    out, written = Path(args.out), 0
    model, config = opened(args, rest)
    height, width = model.image_size(args.height, args.width)
    sampling = args.seed, args.temperature, args.top_k, args.top_p, args.min_p, args.guidance, args.window
    images = model.draw(args.prompts, height, width, *sampling, config.batch, config.decode_batch)  # refuses what is wrong
    check_folder(out, len(args.prompts) * height * width * 3)
    try:
        for image in images:
            print(save(image, out, f"{written:03d}_{re.sub(r'[^A-Za-z0-9]+', '_', args.prompts[written]).strip('_')[:60]}"), flush=True)
            written += 1
    except KeyboardInterrupt:
        print(f"interrupted: {written} of {len(args.prompts)} images are drawn" + f", in {out}" * (written > 0), file=sys.stderr)
        return 130
    print(f"{written} image{'s' * (written > 1)} of {height}x{width} in {time.perf_counter() - began:.1f} s, in {out}")
    return 0


def save(image: Image.Image, folder: Path, name: str) -> Path:
    """Writes an image as PNG under a name that is still free, and returns its path. ValueError, and no file, when the disk is full."""
    folder.mkdir(parents=True, exist_ok=True)
    names = itertools.chain([name], (f"{name}_{n}" for n in itertools.count(2)))
    path = next(path for path in (folder / f"{name}.png" for name in names) if not path.exists())
    with path.open("xb") as file:
        try:
            image.save(file, "png")
            file.flush()
        except BaseException as e:
            path.unlink()
            if isinstance(e, OSError):
                raise ValueError(f"{path} cannot be written ({e.strerror}); make room, or choose another --out") from e
            raise
    return path
