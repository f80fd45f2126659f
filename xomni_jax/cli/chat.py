"""xomni chat: questions about an image."""

from __future__ import annotations

import argparse

from xomni_jax.cli.inference import add_adapter, add_model, opened
from xomni_jax.data.images import UnreadableImage, read_image

EXAMPLE = 'xomni chat images/000_a_red_sign_that_says_HELLO.png "what does the sign say?"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Image, question, model."""
    parser.add_argument("image", metavar="IMAGE", help="an image file (PNG, JPEG, WebP, TIFF, GIF, BMP)")
    parser.add_argument("question", metavar="QUESTION")
    add_model(parser, "", "one device")
    add_adapter(parser)
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="longest answer, in tokens (default 512)")
    what = "take the pixels as the released program does: not turned by EXIF, 16-bit samples clipped, transparency dropped"
    parser.add_argument("--as-stored", action="store_true", help=what)


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Prints the answer."""
    try:
        image = read_image(args.image, as_stored=args.as_stored)
    except UnreadableImage as error:
        raise ValueError(f"the image {args.image} cannot be read: {error}; give another image file") from None
    print(opened(args, rest)[0].chat(image, args.question, args.max_tokens))
    return 0
