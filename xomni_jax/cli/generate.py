"""xomni generate: images from prompts, given on the command line or in files."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from xomni_jax.cli.inference import add_adapter, add_model, add_sampling, add_size, image_file, opened, positive, share
from xomni_jax.core.folders import check_folder

if TYPE_CHECKING:
    from PIL import Image

    from xomni_jax.inference import InferenceConfig
    from xomni_jax.pipeline import XOmni

DETAILS = """\
With --prompts the images of all prompts of a file (text, jsonl, csv, ...) are drawn into --out, with a metadata.jsonl that xomni train and
xomni data read, and a contact sheet. The same command goes on after an interruption of any kind and draws nothing twice. Sample S of
prompt P is image P of seed + S, on whatever machine and with whatever other prompts it is drawn. Each process of several that share the
work takes a --share; one command without it, or the last of them, writes metadata.jsonl.
"""
EXAMPLE = """\
xomni generate 'a red sign that says "HELLO"' 'two blue circles on white' --out images
xomni generate 'a red sign that says "BYE"' --edit sign.png --mask white_where_to_draw.png
xomni generate --prompts my_prompts.txt --n 4 --out runs/drawn
xomni generate --prompts my_prompts.txt --best-of 8 --reward ocr=http://127.0.0.1:8001 --out runs/best"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Prompts, size, sampling, output."""
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to draw; one image each")
    add_model(parser, "", "one device")
    add_size(parser)
    parser.add_argument("--seed", type=int, default=0, help="image i depends on the seed, i and its prompt alone (default 0)")
    parser.add_argument("--out", default="images", metavar="DIR", help="folder for the images (default: images)")
    rare = parser.add_rare_group("editing, sampling, adapters")
    rare.add_argument("--edit", metavar="IMAGE", help="draw a part of this image again, the white one of --mask")
    rare.add_argument("--mask", metavar="IMAGE", help="an image of the same size; a code with any white pixel is drawn again")
    what = "images that all are drawn from, between prompt and image, for a model that learned from records with input images"
    rare.add_argument("--condition", nargs="+", default=[], metavar="IMAGE", help=what)
    add_sampling(rare)
    rare.add_argument("--window", type=positive, metavar="W", help="codes per pass: the same images in fewer passes (default 1)")
    add_adapter(rare)
    many = parser.add_argument_group("prompts in files")
    what = "draw all prompts of these files: a line of text each, jsonl, csv, or what xomni data kinds lists"
    many.add_argument("--prompts", dest="files", nargs="+", default=[], metavar="FILE", help=what)
    many.add_argument("--n", type=positive, default=1, metavar="N", help="samples of each prompt (default 1)")
    many.add_argument("--best-of", type=positive, default=0, metavar="N", help="draw N of each and keep the best --n by --reward")
    many.add_argument("--reward", metavar="NAME=URL", help="a running reward service: xomni serve-reward")
    many.add_argument("--share", type=share, default=(0, 1), metavar="K/N", help="draw the K-th of N shares, which may use one --out")


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Draws and saves; the last line says where."""
    began = time.perf_counter()
    out, written = Path(args.out), 0
    if bool(args.files) == bool(args.prompts):
        raise ValueError("give the prompts, or --prompts FILE" + ", not both" * bool(args.files))
    if not args.files and (args.n, args.best_of, args.reward, args.share) != (1, 0, None, (0, 1)):
        raise ValueError("--n, --best-of, --reward and --share are for prompts in files; write them into one and give --prompts FILE")
    if bool(args.edit) != bool(args.mask):
        raise ValueError("--edit IMAGE and --mask IMAGE belong together; give both")
    if args.edit and (args.files or args.height or args.width):
        raise ValueError("--edit is for prompts on the command line, and the size is that of its image; leave out --prompts and the size")
    if args.condition and args.files:
        raise ValueError("--condition is for prompts on the command line; leave out --prompts")
    conditions = [image_file(file) for file in args.condition]
    edited = [image_file(file) for file in (args.edit, args.mask) if file]
    model, config = opened(args, rest)
    if args.files:
        return draw_files(args, model, config)
    known = model.known_codes(*edited) if edited else None
    height, width = model.image_size(args.height, args.width) if known is None else model.size_of(known.shape)
    sampling = args.seed, args.temperature, args.top_k, args.top_p, args.min_p, args.guidance, args.window
    images = model.draw(
        args.prompts, height, width, *sampling, config.batch, config.decode_batch, known, model.encode(conditions)
    )  # refuses what is wrong
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


def draw_files(args: argparse.Namespace, model: XOmni, config: InferenceConfig) -> int:
    """Draws the prompts of files; the last line says where. 75 when it was stopped: the same command goes on."""
    from xomni_jax.core.preemption import StopRequested, StopSignal
    from xomni_jax.evaluation.prompt_files import PromptFileRun, PromptFiles
    from xomni_jax.rewards.client import RewardClient

    if bool(args.best_of) != bool(args.reward):
        raise ValueError("--best-of needs --reward NAME=URL, which chooses, and --reward needs --best-of")
    if args.best_of and args.best_of < args.n:
        raise ValueError(f"--best-of {args.best_of} is less than --n {args.n}, the images to keep; raise it")
    names = ("height", "width", "temperature", "top_k", "top_p", "min_p", "guidance", "window")
    config = dataclasses.replace(config, **{name: getattr(args, name) for name in names})
    with ExitStack() as stack:
        reward = None
        if args.reward:
            name, equals, urls = args.reward.partition("=")
            if not equals:
                raise ValueError(f"--reward {args.reward!r} is not NAME=URL; write for example ocr=http://127.0.0.1:8001")
            reward = stack.enter_context(RewardClient(name, urls.split(",")))
        began = time.perf_counter()
        what = PromptFiles(tuple(args.files), args.seed, args.n, args.best_of, args.share)
        run = PromptFileRun(what, model, config, Path(args.out), reward)
        try:
            with StopSignal() as stop:
                kept, wanted = run.make(stop)
        except StopRequested:
            print(f"stopped: what is drawn is in {args.out}; the same command goes on", file=sys.stderr)
            return 75
    rest = "" if kept == wanted else f"; other shares hold the rest of {wanted}"
    print(f"{kept} images of {len(run.records)} prompts in {time.perf_counter() - began:.1f} s, in {args.out}{rest}")
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
