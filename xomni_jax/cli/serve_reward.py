"""`xomni serve-reward NAME --port P`: run one scoring service."""

from __future__ import annotations

import argparse

NAMES = ("ocr", "shapes", "quality", "tesseract", "detector")
_OPTIONS = {"ocr": ("mode", "formula", "second"), "quality": ("references",), "detector": ("detector", "clip", "device", "short_side")}

EXAMPLE = """\
A service scores images over HTTP; the trainer and the evaluations ask it. GET /health says how it is.

ocr      reads the image (PP-OCR) and compares the text with targets["text"]
shapes   colour of the ground, and count, shape and colour of drawn objects
quality  likeness to rendered images: notices noise, blur, compression; needs no target
tesseract  reads with another program than ocr does: a second opinion for evaluations (xomni eval effect --second URL)
detector   finds objects and their colours (Mask2Former and CLIP, with torch): the judge of xomni eval geneval --judge URL

Several replicas of one scorer may run on other ports or machines; give the trainer all their URLs.

Start one per reward, in a terminal of its own:

  xomni serve-reward ocr --port 8001
  xomni serve-reward shapes --port 8002
  xomni rewards ocr=http://127.0.0.1:8001 shapes=http://127.0.0.1:8002
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's own options."""
    parser.add_argument("name", metavar="NAME", choices=NAMES, help="ocr, shapes, quality, tesseract or detector")
    parser.add_argument("--port", type=int, default=8001, help="where to listen; 0 takes a free one (default 8001)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in (default 127.0.0.1)")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each; about one per core (default 2)")
    ocr = parser.add_argument_group("ocr only")
    ocr.add_argument(
        "--mode",
        choices=("auto", "crop", "detect"),
        help="read the content crop, or detect lines first (default auto: by height)",
    )
    ocr.add_argument("--formula", choices=("auto", "edit", "substring", "recall"), help="how texts are compared (default auto: by length)")
    ocr.add_argument("--second", choices=("tesseract",), help="a second reader; the lower score counts")
    quality = parser.add_argument_group("quality only")
    quality.add_argument("--references", metavar="DIR", help="images that count as good (default: 400 rendered training images)")
    detector = parser.add_argument_group("detector only")
    detector.add_argument("--detector", metavar="DIR", help="local copy of facebook/mask2former-swin-small-coco-instance")
    detector.add_argument("--clip", metavar="DIR", help="local copy of openai/clip-vit-large-patch14")
    detector.add_argument(
        "--short-side", type=int, metavar="PIXELS", help="of the image that is searched (default 800, as official; less is quicker)"
    )
    detector.add_argument("--device", help="where torch runs, such as cuda:0 (default: a GPU when there is one, else the CPU)")


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Serve until stopped. ValueError (one sentence) when the port is taken, a package is missing or an option does not fit."""
    from xomni_jax.rewards.services.base import ServiceError
    from xomni_jax.rewards.services.server import ServiceConfig, serve

    options = {k: getattr(args, k) for names in _OPTIONS.values() for k in names if getattr(args, k) is not None}
    for option in options:
        if option not in _OPTIONS.get(args.name, ()):
            owner = next(name for name, names in _OPTIONS.items() if option in names)
            raise ServiceError(f"--{option.replace('_', '-')} belongs to {owner}; serve-reward {args.name} does not take it")
    serve(ServiceConfig(args.name, options, workers=args.workers), args.host, args.port)
    return 0
