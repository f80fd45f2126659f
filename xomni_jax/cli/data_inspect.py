"""xomni data inspect: a look at the examples that training would see."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from xomni_jax.cli.data_config import with_data
from xomni_jax.core.config import ConfigError
from xomni_jax.core.folders import check_folder

if TYPE_CHECKING:
    from xomni_jax.data.sources import DataSection

NAME, HELP = "inspect", "look at the first examples, the lengths of captions, the sizes of images, and repeated images"
EXAMPLE = "xomni data inspect --config=my_images --out=look.html"
ABOUT = """\
Reads examples as training would and prints the lengths of their captions, the sizes of their images, repeated images, and what cannot be
used. The page also shows the first examples, each beside what the decoder of config.init_from makes of its codes.
"""
SIZES = ((256, 256), (192, 256), (256, 192))  # (height, width) of the images of a folder that is given without a configuration


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's own options."""
    parser.add_argument(
        "--config", required=True, metavar="FILE|DIR", help="a configuration of training, a folder of images with captions, or one of codes"
    )
    parser.add_argument("--out", metavar="PAGE", help="write the page here")
    parser.add_argument("--show", type=int, default=24, metavar="N", help="examples on the page (default %(default)s)")
    parser.add_argument("--read", type=int, default=1000, metavar="N", help="examples that are counted and compared (default %(default)s)")


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Prints what was found, writes the page."""
    if args.show < 0 or args.read < 1:
        raise ConfigError(f"--show {args.show} and --read {args.read} must be at least 0 and 1")
    if args.out:
        check_folder(Path(args.out).parent, 0)
    from xomni_jax.evaluation import data_page
    from xomni_jax.pipeline import XOmni

    data, seed, init_from = _of_folder(Path(args.config), rest) if Path(args.config).is_dir() else _of_config(args.config, rest)
    model = XOmni(init_from) if init_from else None
    found = data_page.look(data, seed, model, args.show, args.read)
    print(data_page.as_text(found))
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        print(f"written: {data_page.write_html(args.out, args.config, found, model)}")
    return 0


def _of_config(path: str, rest: list[str]) -> tuple[DataSection, int, str]:
    cfg = with_data(path, rest)
    return cfg.data, cfg.seed, cfg.init_from


def _of_folder(folder: Path, rest: list[str]) -> tuple[DataSection, int, str]:
    from xomni_jax.data.codes import SETTINGS, read_index
    from xomni_jax.data.rendered import SIGNS

    if rest:
        raise ConfigError(f"{rest[0]}: belongs to a configuration; --config={folder} is a folder")
    if not (folder / SETTINGS).is_file():
        return SIGNS.updated({"source": "files", "path": str(folder), "sizes": SIZES}, "config.data"), 0, ""
    data = SIGNS.updated({"source": "codes", "path": str(folder)}, "config.data")
    model = read_index(folder)["model"]
    return data, 0, model if Path(model, "model.json").is_file() else ""
