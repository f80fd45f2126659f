"""xomni convert: downloaded PyTorch checkpoints into one model directory."""

from __future__ import annotations

import argparse
import sys

from xomni_jax.checkpoint.component_source import NewParts
from xomni_jax.checkpoint.conversion_plan import DTYPES, plan_conversion
from xomni_jax.checkpoint.conversion_report import plan_lines
from xomni_jax.checkpoint.convert import convert
from xomni_jax.checkpoint.released import PARTS
from xomni_jax.core.tables import bytes_text

DETAILS = """\
The directories are read as they were downloaded; nothing in them is run, and no PyTorch is needed. --xomni may be:

  X-Omni-En, -Zh, -SFT, -PT   transformer, image tokenizer and decoder, found through its config.json
  a plain Qwen2.5             a transformer to train: vision layers, image embedding and image head start at random
  a plain SigLIP2             an image tokenizer to train: quantizer, codebook and projector start at random
  a file of LlamaGen          its tokenizer (vq_ds16_c2i.pt) or a class-conditional model (c2i_B_256.pt), one after the other into one TO

--flux is FLUX.1-dev: VAE, text encoders, their tokenizers; without X-Omni its transformer too, with a semantic input that starts at zero.
Of an export, the folder flux inside --xomni is taken where none is given.
Training keeps its parameters in float32: convert what it starts from with --dtype float32.

Everything is checked before anything is written; --plan prints what would be done. The work is done in TO.part: the same command resumes
an interrupted conversion, and TO appears when it is complete. A second conversion into TO adds the parts that it lacks.
Beside the checkpoint, conversion.json says which tensor of which file (with its sha256) became what.
"""
EXAMPLE = """\
xomni convert --xomni X-Omni-En --flux FLUX.1-dev --to models/xomni --plan
xomni convert --xomni X-Omni-En --flux FLUX.1-dev --to models/xomni
xomni convert --xomni Qwen2.5-7B --to models/start
xomni convert --xomni siglip2-giant-opt-patch16-384 --to models/start
xomni convert --xomni vq_ds16_c2i.pt --to models/llamagen && xomni convert --xomni c2i_B_256.pt --to models/llamagen
xomni export --from xomni_jax/assets/tiny_sft --to tiny_released && xomni convert --xomni tiny_released --to tiny_model"""
# (option, field of NewParts, help)
NEW = (
    ("--image-vocab", "image_vocab_size", "image codes"),
    ("--mm-vocab", "mm_vocab_size", "image codes, special and spare ids"),
    ("--adapter-layers", "adapter_layers", "vision layers before the language layers"),
    ("--head-layers", "head_layers", "vision layers after them"),
    ("--code-width", "code_width", "width of a codebook row"),
    ("--seed", "seed", "of the initial values"),
    ("--heads", "heads", "attention heads of a LlamaGen model; 0: as published"),
    ("--columns", "columns", "columns of its grid of codes: 16 for 256 pixels, 24 for 384"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's own options."""
    parser.add_argument("--xomni", metavar="DIR", help="X-Omni, a plain Qwen2.5, a plain SigLIP2, or a file of LlamaGen")
    parser.add_argument("--flux", metavar="DIR", help="FLUX.1-dev")
    parser.add_argument("--to", metavar="DIR", help="the model directory to make, or to add parts to")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="keep", help="of the stored parameters (default keep: as in the files)")
    parser.add_argument("--only", choices=tuple(PARTS), help="one part; text means T5 and CLIP")
    parser.add_argument("--plan", action="store_true", help="print what would become what, and stop")
    start = parser.add_argument_group("what a plain model lacks")
    for option, field, text in NEW:
        start.add_argument(
            option, dest=field, type=int, default=getattr(NewParts, field), metavar="N", help=f"{text} (default %(default)s)"
        )


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Converts, or prints the plan. ValueError: one sentence, or every problem of the plan."""
    if args.xomni is None and args.flux is None:
        raise ValueError("neither --xomni nor --flux is given; say what to convert")
    if not (args.to or args.plan):
        raise ValueError("--to is missing; say where the model directory goes, or --plan to look only")
    parts = NewParts(**{field: getattr(args, field) for _, field, _ in NEW})
    least = {"image_vocab_size": 1, "mm_vocab_size": 1, "code_width": 1, "columns": 1}
    small = next((k for k, v in vars(parts).items() if v < least.get(k, 0)), None)
    if small:
        raise ValueError(f"{small}={getattr(parts, small)} is too small; leave the option out for the released size")
    if args.plan:
        plan = plan_conversion(args.xomni, args.flux, args.to, args.dtype, args.only, parts)
        for line in (*plan.release.notes, *plan_lines(plan)):
            print(line)
        print(f"nothing written; {bytes_text(plan.nbytes)} would be")
        return 0
    for warning in convert(args.xomni, args.flux, args.to, args.dtype, args.only, parts):
        print(f"warning: {warning}", file=sys.stderr)
    print(f"written: {args.to}")
    return 0
