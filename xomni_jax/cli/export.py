"""xomni export: a model directory back into the released PyTorch layout."""

from __future__ import annotations

import argparse

from xomni_jax.checkpoint.conversion_plan import DTYPES
from xomni_jax.checkpoint.released import PARTS

DETAILS = """\
The keys and files are those of the released checkpoints: config.json, sharded safetensors with an index, the image tokenizer's two files,
the MMDiT in its own folder. What belongs to FLUX.1-dev (VAE, text encoders) goes to TO/flux, which xomni convert takes as --flux. Tensors
equal the converted ones byte for byte, unless they were trained or --dtype is given; tensors that the model does not use (the ViT's
pooling head) are missing.
To run the result with the published PyTorch code, copy its *.py files beside config.json.
"""
EXAMPLE = """\
xomni export --from models/xomni --to X-Omni-mine
xomni export --from runs/grpo/model --to X-Omni-mine --only transformer --dtype bfloat16 --shard-gb 2
xomni export --from models/xomni --to X-Omni-mine --pth
xomni export --from xomni_jax/assets/tiny_sft --to tiny_released"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's own options."""
    parser.add_argument("--from", dest="model", required=True, metavar="DIR", help="model directory")
    parser.add_argument("--to", required=True, metavar="DIR", help="the directory to make")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="keep", help="of the tensors (default keep: as stored)")
    parser.add_argument("--only", choices=tuple(PARTS), help="one part; text means T5 and CLIP")
    parser.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="most that one safetensors file holds (default 5)")
    parser.add_argument("--pth", action="store_true", help="the image tokenizer as .pth, as released, instead of safetensors")


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Exports. ValueError: one sentence."""
    from xomni_jax.checkpoint.export import export

    if not args.shard_gb > 0:
        raise ValueError(f"--shard-gb {args.shard_gb:g} must be above 0")
    export(args.model, args.to, args.dtype, args.only, int(args.shard_gb * 1e9), args.pth)
    print(f"written: {args.to}")
    return 0
