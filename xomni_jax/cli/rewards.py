"""`xomni rewards NAME=URL ...`: print the state of scoring services, and score images with them; `xomni rewards check URL ...`."""

from __future__ import annotations

import argparse

from PIL import Image

from xomni_jax.data.images import UnreadableImage, read_image

DETAILS = """\
xomni rewards check URL... sends a built-in set of images, whose order is known for the scorers of the package, to the replicas of one
scorer and prints speed and agreement; exit code 1 when they cannot be trusted. XOMNI_REWARD_TOKEN is sent as bearer token.
Several replicas of one scorer: ocr=http://host-a:8001,http://host-b:8001
"""
EXAMPLE = """\
xomni serve-reward ocr --port 8001
xomni rewards ocr=http://127.0.0.1:8001
xomni rewards ocr=http://127.0.0.1:8001 --image sign.png --text HELLO
xomni rewards check http://127.0.0.1:8001"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's own options."""
    parser.add_argument("services", metavar="NAME=URL", nargs="+", help="a scorer and the URL of its service; or: check URL...")
    parser.add_argument("--image", metavar="FILE", nargs="+", default=[], help="images to score")
    parser.add_argument("--prompt", default="", help="the prompt of the images")
    parser.add_argument("--text", nargs="+", help="the text that the images should show, for ocr")
    parser.add_argument("--background", help="the background colour that the images should have, for shapes")


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Print one line per service and one per image. 1 when an image could not be scored; ValueError when nothing answers."""
    from xomni_jax.rewards.client import RewardClient

    if args.services[0] == "check":
        return _check(args.services[1:])
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


def _check(urls: list[str]) -> int:
    from xomni_jax.rewards.check import check

    if not urls:
        raise ValueError("xomni rewards check needs the address of a service, such as http://127.0.0.1:8001")
    name, findings = check(urls)
    for finding in findings:
        print(f"{ {None: '      ', True: 'ok    ', False: 'FAILED'}[finding.ok] }  {finding.what}: {finding.told}")
    failed = [finding.what for finding in findings if finding.ok is False]
    print(f"{name} cannot be trusted: {', '.join(failed)}" if failed else f"{name} can be trusted")
    return 1 if failed else 0


def _read(file: str) -> Image.Image:
    try:
        return read_image(file)
    except UnreadableImage as error:
        raise ValueError(f"the image {file} cannot be read: {error}; give a PNG, JPEG or WebP file") from error
