"""xomni export: a model directory back into the released PyTorch layout."""

from __future__ import annotations

import argparse

from xomni_jax.checkpoint.conversion_plan import DTYPES
from xomni_jax.checkpoint.released import PARTS

DETAILS = """\
The keys, files and configs are those that the model was converted from; what training changed is changed in them. Tensors equal the
converted ones byte for byte, unless they were trained or --dtype is given; tensors that the model does not use (the ViT's pooling head)
are missing. Without a released original they are named as in X-Omni-En.

To run the result with the published PyTorch code (torch 2.6, transformers 4.51.3, diffusers 0.34), copy the *.py files of a downloaded
X-Omni beside config.json; its generate.py and chat.py take TO as --model_name_or_path. The --flux_model_name_or_path is FLUX.1-dev, or
TO/flux where the VAE or the text encoders were trained: diffusers opens it as a FluxPipeline, whose transformer is a link to the MMDiT.
The last lines say what that code cannot run, and which folders of FLUX.1-dev TO/flux needs. xomni convert --xomni TO reads all of it again.
"""
EXAMPLE = """\
xomni export --from models/xomni --to X-Omni-mine
xomni export --from runs/grpo/model --to X-Omni-mine --only transformer --dtype bfloat16 --shard-gb 2
xomni export --from models/xomni --to X-Omni-mine --safetensors
xomni export --from xomni_jax/assets/tiny_sft --to tiny_released"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's own options."""
    parser.add_argument("--from", dest="model", required=True, metavar="DIR", help="model directory")
    parser.add_argument("--to", required=True, metavar="DIR", help="the directory to make")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="keep", help="of the tensors (default keep: as stored)")
    parser.add_argument("--only", choices=tuple(PARTS), help="one part; text means T5 and CLIP")
    parser.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="most that one safetensors file holds (default 5)")
    parser.add_argument(
        "--safetensors", action="store_true", help="the image tokenizer as safetensors, which torch 2.6 does not load, instead of .pth"
    )


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Exports. ValueError: one sentence."""
    from xomni_jax.checkpoint.export import export

    if not args.to:
        raise ValueError("--to is empty; say where the export goes")
    if not args.shard_gb > 0:
        raise ValueError(f"--shard-gb {args.shard_gb:g} must be above 0")
    export(args.model, args.to, args.dtype, args.only, int(args.shard_gb * 1e9), args.safetensors)
    print(f"written: {args.to}")
    return 0
