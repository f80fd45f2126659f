"""xomni chat: questions about an image."""

from __future__ import annotations

import argparse

from xomni_jax.cli.inference import add_adapter, add_model, image_file, opened

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
    image = image_file(args.image, args.as_stored)
    print(opened(args, rest)[0].chat(image, args.question, args.max_tokens))
    return 0
