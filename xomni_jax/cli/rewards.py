"""`xomni rewards NAME=URL ...`: print the state of scoring services, and score images with them."""

from __future__ import annotations

import argparse

from PIL import Image

from xomni_jax.data.images import UnreadableImage, read_image

DETAILS = """\
Several replicas of one scorer: ocr=http://host-a:8001,http://host-b:8001
"""
EXAMPLE = """\
xomni serve-reward ocr --port 8001
xomni rewards ocr=http://127.0.0.1:8001
xomni rewards ocr=http://127.0.0.1:8001 --image sign.png --text HELLO"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's own options."""
    parser.add_argument("services", metavar="NAME=URL", nargs="+", help="a scorer and the URL of its service")
    parser.add_argument("--image", metavar="FILE", nargs="+", default=[], help="images to score")
    parser.add_argument("--prompt", default="", help="the prompt of the images")
    parser.add_argument("--text", nargs="+", help="the text that the images should show, for ocr")
    parser.add_argument("--background", help="the background colour that the images should have, for shapes")


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Print one line per service and one per image. 1 when an image could not be scored; ValueError when nothing answers."""
    from xomni_jax.rewards.client import RewardClient

    images = [_read(file) for file in args.image]
    targets = {k: v for k, v in (("text", args.text), ("background", args.background)) if v}
    failed = 0
    for service in args.services:
        name, equals, urls = service.partition("=")
        if not equals:
            raise ValueError(f"{service!r} is not NAME=URL; write for example ocr=http://127.0.0.1:8001")
        with RewardClient(name, urls.split(",")) as client:
            for url, health in zip(urls.split(","), client.health()):
                print(f"{name} {health.version} at {url}: {health.workers} workers, {health.scored} scored, {health.queue} queue")
            for file, s in zip(args.image, client.score(images, [{"prompt": args.prompt, "targets": targets, "group": "1"}] * len(images))):
                failed += s.failed
                outcome = f"{s.value:.3f}" if s.value is not None else f"not scored: {s.error}" if s.failed else "does not apply"
                print(f"  {file}: {outcome} {s.detail or ''}".rstrip())
    return 1 if failed else 0


def _read(file: str) -> Image.Image:
    try:
        return read_image(file)
    except UnreadableImage as error:
        raise ValueError(f"the image {file} cannot be read: {error}; give a PNG, JPEG or WebP file") from error
