"""Options that the commands of inference share: the model, its mesh, size of images and sampling."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

    from xomni_jax.inference import InferenceConfig
    from xomni_jax.pipeline import XOmni

# A sum that is split over processes is added in another order, which may change the choice between two almost equally likely codes.
EXACT = "data=N gives the same outputs to the bit with any number of processes"


def add_model(parser: Any, mesh: str, default: str, several: bool = False) -> None:
    """--config, --model and --mesh; `mesh` says more about the last, `default` what it is without. `several`: models with names."""
    what = "a configuration of inference, such as configs/xomni/generate.py; --config.KEY=VALUE changes it, other options come on top"
    parser.add_argument("--config", metavar="FILE", help=what)
    ships = "(default: the tiny model that ships with the package)"
    if several:
        what = f"model directory, perhaps with a name for it; may be given several times {ships}"
        parser.add_argument("--model", action="append", metavar="[NAME=]DIR", help=what)
    else:
        parser.add_argument("--model", metavar="DIR", help=f"model directory {ships}")
    what = f"devices per mesh axis: data, fsdp, tensor (default: {default}){mesh}"
    parser.add_argument("--mesh", type=_mesh, metavar="AXIS=N,...", help=what)


def add_adapter(parser: Any) -> None:
    """--adapter."""
    what = "add the adapters of a training with config.lora.rank to the model: the folder RUN/adapter"
    parser.add_argument("--adapter", metavar="DIR", help=what)


def add_drawing(parser: Any) -> None:
    """Size and sampling; the defaults are the released ones."""
    add_size(parser)
    add_sampling(parser)


def add_size(parser: Any) -> None:
    """--height and --width."""
    parser.add_argument("--height", type=positive, metavar="PIXELS", help="default: the model's own (1152 as released)")
    parser.add_argument("--width", type=positive, metavar="PIXELS", help="default: the model's own (1152 as released)")


def add_sampling(parser: Any) -> None:
    """Sampling of the codes."""
    parser.add_argument("--temperature", type=float, help="of the image codes; 0 takes the likeliest (default 1)")
    parser.add_argument("--top-k", type=int, metavar="K", help="keep the K likeliest codes; 0 is off (default 50)")
    parser.add_argument("--top-p", type=float, metavar="P", help="keep the likeliest codes that hold P; 1 is off (default 1)")
    parser.add_argument("--min-p", type=float, metavar="P", help="drop codes below P times the likeliest (default 0.03)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance of the codes; 1 is off (default 1)")


def settle(args: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Fills the options that were not given from --config and its overrides `rest`, or with the defaults.

    `args.sections` becomes the configuration, or None without --config.
    """
    from xomni_jax.core.config import ConfigError, read_overrides
    from xomni_jax.inference import InferenceConfig, read_config

    overrides = read_overrides(rest)
    if overrides and not args.config:
        raise ConfigError(f"--config.{overrides[0]} changes a configuration, and none is given; add --config=FILE")
    args.sections = read_config(args.config, overrides) if args.config else None
    for name, value in vars(args.sections or InferenceConfig()).items():
        if name in args and name != "mesh" and getattr(args, name) is None:
            setattr(args, name, value)
    if args.sections and args.mesh is None:
        args.mesh = args.sections.mesh.sizes()


def opened(args: argparse.Namespace, rest: Sequence[str]) -> tuple[XOmni, InferenceConfig]:
    """The model that the options name, on its mesh, and the configuration; settles the options first."""
    from xomni_jax.inference import InferenceConfig, open_model
    from xomni_jax.sharding.mesh import make_mesh

    settle(args, rest)
    model = open_model(args.model, make_mesh(args.mesh) if args.mesh else None, args.sections)
    if args.adapter:
        model.adapt(args.adapter)
    return model, args.sections or InferenceConfig()


def image_file(path: str, as_stored: bool = False) -> Image.Image:
    """The image of a file; `as_stored`: see `data.images.to_rgb`. ValueError where it cannot be read."""
    from xomni_jax.data.images import UnreadableImage, read_image

    try:
        return read_image(path, as_stored=as_stored)
    except UnreadableImage as error:
        raise ValueError(f"the image {path} cannot be read: {error}; give another image file") from None


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def share(text: str) -> tuple[int, int]:
    """K/N, the K-th of N equal parts of the work -> (K - 1, N)."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no share; write K/N with K from 1 to N, such as 1/2")
    return int(found[1]) - 1, int(found[2])


def _mesh(text: str) -> dict[str, int]:
    found = [re.fullmatch(r"(\w+)=(-?\d+)", part.strip()) for part in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} is no mesh; write it like fsdp=4,tensor=2")
    return {part[1]: int(part[2]) for part in found}
