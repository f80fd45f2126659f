"""`xomni SUBCOMMAND`: parse, build, call, print. Errors that a user can fix are one sentence and exit code 2."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import textwrap
import warnings
from pathlib import Path

from xomni_jax import __version__
from xomni_jax.cli.parser import Parser
from xomni_jax.core.preemption import interruptible
from xomni_jax.core.shipped import shipped

# name -> one line of help; the module xomni_jax.cli.<name with underscores> provides add_arguments(parser), run(args, rest), EXAMPLE and
# perhaps DETAILS, which only --help-all shows.
COMMANDS = {
    "generate": "draw images from prompts",
    "chat": "ask a question about an image",
    "train": "run a training stage: tokenizer, pretrain, sft, decoder, grpo",
    "eval": "score models on the paper's benchmarks, and measure what reinforcement learning changed",
    "data": "sets of images to train on; check files of your own, look at them, make their codes once; files of benchmarks",
    "report": "curves, images, differences and events of training runs on one page",
    "compare": "paired differences between runs of one benchmark",
    "convert": "turn downloaded PyTorch checkpoints into a model directory",
    "export": "turn a model directory back into the released PyTorch layout",
    "inspect": "show what a checkpoint holds, or how two differ",
    "serve": "images and answers over HTTP, in OpenAI's form, and a page to draw, compare and ask with",
    "serve-reward": "start a scoring service: readers of text, published models of preference, judges, one of your own",
    "rewards": "check running reward services, or score images with them",
    "plan": "compile a run for a TPU slice without having it: does it fit, what limits its speed, what does it cost",
    "bench": "measure speed: against transformers and diffusers, of GRPO, conversion, evaluation, data, codes, rewards, serving",
}


def build_parser() -> Parser:
    """The whole command line; subcommand modules are imported only for the one that is used."""
    parser = Parser(
        prog="xomni",
        description="X-Omni in JAX: discrete autoregressive image generation, trained with reinforcement learning.",
        epilog="xomni SUBCOMMAND --help explains one and ends with an example that works.",
    )
    parser.add_argument("--version", action="version", version=f"xomni_jax {__version__}", help="show the version")
    commands = parser.add_subparsers(dest="command", metavar="SUBCOMMAND", required=True, title="subcommands")
    wanted = next((a for a in sys.argv[1:] if not a.startswith("-")), None)
    for name, line in COMMANDS.items():
        sub = commands.add_parser(name, help=line, description=line[0].upper() + line[1:] + ".")
        if name == wanted:
            module = importlib.import_module("xomni_jax.cli." + name.replace("-", "_"))
            module.add_arguments(sub)
            sub.details = sub.details or getattr(module, "DETAILS", "")
            sub.epilog = f"example{'s' * (chr(10) in module.EXAMPLE)}:\n" + textwrap.indent(module.EXAMPLE, "  ")
            sub.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of the `xomni` command; returns the exit code."""
    if argv is not None:
        sys.argv[1:] = argv
    set_up()
    command = ""
    try:
        with interruptible():
            args, rest = build_parser().parse_known_args()
            command = args.command
            vars(args).update({name: shipped(value) for name, value in vars(args).items() if isinstance(value, str)})
            return args.run(args, rest) or 0
    except (KeyboardInterrupt, ValueError, OSError, FloatingPointError, KeyError) as e:
        return explain(command, e)


def set_up(root: Path = Path("/")) -> None:
    """Settings of JAX, which the user's environment overrides: programs are kept between commands, and a TPU is not looked for where there
    is none, since libtpu would print several lines about that."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(cache, "xomni_jax", "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    if importlib.util.find_spec("libtpu") and not has_accelerator(root):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def has_accelerator(root: Path) -> bool:
    """Whether the machine has a TPU or a GPU: a device file, or a PCI device of Google's other than its network card."""
    files = ("accel[0-9]*", "vfio/[0-9]*", "nvidia[0-9]*", "nvidiactl", "kfd", "dxg")
    if any(next(root.glob(f"dev/{name}"), None) for name in files):
        return True
    pci = root.glob("sys/bus/pci/devices/*/vendor")
    return any(v.read_text().strip() == "0x1ae0" and (v.parent / "device").read_text().strip() != "0x0042" for v in pci)


def explain(command: str, e: BaseException) -> int:
    """Prints an error that the user can fix as one sentence and returns the exit code; raises any other error again."""
    if isinstance(e, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    if isinstance(e, BrokenPipeError):
        return 1
    if os.environ.get("XOMNI_DEBUG") or not isinstance(e, (ValueError, OSError, FloatingPointError, KeyError)):
        raise e
    message = str(e.args[0]) if isinstance(e, KeyError) and e.args else str(e)
    if isinstance(e, OSError) and e.filename and e.strerror:  # without the number of the error
        message = f"{os.fsdecode(e.filename)}: {e.strerror}"
    first, *more = message.strip().splitlines() or [type(e).__name__]
    if more and type(e).__module__.startswith("xomni_jax."):
        first = message.strip()  # a list of problems, such as those of a conversion
    elif more and not isinstance(e, OSError):
        # Our own messages are one sentence each; several lines come from inside a library, not from wrong input.
        print(f"xomni {command}: internal error, {type(e).__name__}: {first} (XOMNI_DEBUG=1 shows where)", file=sys.stderr)
        return 1
    print(f"xomni {command}: {first}", file=sys.stderr)
    return getattr(e, "exit_code", 2)


if __name__ == "__main__":
    sys.exit(main())
