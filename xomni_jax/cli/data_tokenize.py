"""xomni data tokenize: images to codes once, for all later training."""

from __future__ import annotations

import argparse
import dataclasses

from xomni_jax.cli.data_config import with_data

NAME, HELP = "tokenize", "make the codes of all images once, for training without the image encoder"
EXAMPLE = """\
xomni data tokenize --config=configs/tiny/sft.py --out=codes --config.init_from=xomni_jax/assets/tiny_sft --config.data.source=files \\
    --config.data.path=my_images --config.data.sizes="((32,64),)"
xomni train --config=configs/tiny/sft.py --config.data.source=codes --config.data.path=codes"""
ABOUT = """\
Encodes every image of the configuration's data once with the tokenizer of config.init_from, on all devices of all hosts. A job that was
killed goes on with the same command. Records that cannot be used are listed in OUT/rejected.jsonl.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's own options."""
    from xomni_jax.core.options import add_flags
    from xomni_jax.training.tokenize_data import TokenizeConfig

    parser.add_argument("--config", required=True, metavar="FILE", help="a configuration of training, whose data and init_from are used")
    add_flags(parser, TokenizeConfig)
    parser.add_argument("--distributed", action="store_true", help="as of xomni train: share the work with the other hosts of the slice")


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Runs the job; the last line says what it wrote."""
    from xomni_jax.cli.train import run_in_group, shared_settings
    from xomni_jax.core import distributed
    from xomni_jax.training.tokenize_data import TokenizeConfig, tokenize

    cfg = with_data(args.config, rest)
    options = TokenizeConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(TokenizeConfig)})
    group = distributed.start(shared_settings(cfg), args.distributed)
    if group is None:
        print(tokenize(cfg, options))
        return 0

    def action() -> int:
        print(tokenize(cfg, options, group.index, group.count), flush=True)
        return 0

    return run_in_group(group, action, "data tokenize")
