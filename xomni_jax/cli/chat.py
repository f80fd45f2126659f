"""xomni chat: questions about an image."""

from __future__ import annotations

import argparse

from PIL import Image, UnidentifiedImageError

from xomni_jax.cli.inference import add_model, opened

EXAMPLE = 'xomni chat images/000_a_red_sign_that_says_HELLO.png "what does the sign say?"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Image, question, model."""
    parser.add_argument("image", metavar="IMAGE", help="an image file (PNG, JPEG, WebP)")
    parser.add_argument("question", metavar="QUESTION")
    add_model(parser, "", "one device")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="longest answer, in tokens (default 512)")


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Prints the answer."""
    if args.max_tokens < 1:
        raise ValueError(f"--max-tokens {args.max_tokens} must be at least 1")
    print(opened(args, rest).chat(read_image(args.image), args.question, args.max_tokens))
    return 0


def read_image(path: str) -> Image.Image:
    """An image file as RGB. Raises ValueError in one sentence when it is missing or no image."""
    try:
        with Image.open(path) as image:
            image.verify()  # notices a cut file whatever Pillow is told about truncation elsewhere in the process
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give an image") from None
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as e:
        raise ValueError(f"{path}: not a readable image ({str(e).splitlines()[0]}); give a PNG, JPEG or WebP file") from None
