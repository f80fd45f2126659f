"""xomni bench: speed against transformers and diffusers, parts of a GRPO step, costs of conversion, evaluation and reading data."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xomni_jax.assets import TINY_SFT

_COMPARED = ("decode", "train", "mmdit")
_OPTIONS = dict.fromkeys(_COMPARED, ("size", "threads")) | {
    "grpo": ("model", "config"),
    "convert": ("gb", "dir"),
    "eval": ("model",),
    "data": (),
    "tokenize": ("model",),
    "rewards": ("model", "config", "faults", "bodies"),
    "serve": ("model", "faults"),
    "window": ("model",),
    "device": ("size",),
    "scaling": ("model",),
    "start": ("model",),
    "decoder-price": ("model", "config"),
}
NAMES = tuple(_OPTIONS)

DETAILS = """\
In decode, train and mmdit both sides do the same work with the same weights and all cores; results are compared before anything is timed.

decode  greedy decoding at batch 1 and 16, against transformers' Qwen2
train   one train step with AdamW, against transformers' Qwen2
mmdit   one forward pass of the decoder's transformer, against diffusers' FLUX
grpo    seconds of a GRPO step in rollout, decode, reward and update; starts its reward services itself
convert peak memory and speed of xomni convert, export and inspect --diff against a plain copy and the hash alone, on random values in the
        released layout, which it writes and removes
eval    items per second of xomni eval on the rendered suites, in one process and shared by two; seconds for 240 questions to a judge
data    examples per second of every format of training data, against the bare reader of the library that reads it
tokenize images per second of xomni data tokenize against the bare encoder at the same batch
rewards what the way to a reward service costs, and how much of a slow one hides; with --faults, a GRPO run whose requests meet
        1,000 faults; with --bodies N, how a service takes so many damaged requests
serve   images per second and latencies of xomni serve at 1, 8 and 32 clients, against a plain batch; with --faults, mixed requests of
        clients some of whom vanish, for --seconds
window  images in several codes per pass (sampling.window) against one code per pass: speed, codes found per pass, images that differ
device  drawing codes and a train step on this accelerator, a TPU or a GPU, as shares of its published bandwidth and operations
scaling what 2, 4 and 8 devices (simulated) and two processes cost beyond their work, for steps of fine-tuning and of GRPO
start   seconds from xomni generate to its images and from xomni train to its first step, with an empty and a filled cache of programs
decoder-price  rank correlation, within groups of rollouts, of the rewards under fewer denoising steps and reused blocks with those of the
        full decoder; the cheapest setting that reaches 0.95 for every reward

decode, train and mmdit need the extra [parity], grpo and decoder-price need [rewards].
"""
EXAMPLE = """\
xomni bench decode
xomni bench train --size small
xomni bench mmdit --threads 1 --json mmdit.json
xomni bench grpo
xomni bench convert --gb 4 --dir /tmp
xomni bench eval
xomni bench data --seconds 20
xomni bench tokenize --repeats 5
xomni bench rewards --faults
xomni bench serve
xomni bench window
xomni bench device --size tiny
xomni bench scaling
xomni bench start
xomni bench decoder-price"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's own options."""
    parser.add_argument("name", metavar="NAME", choices=NAMES, help="one of the examples below")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="most timed pairs per case; grpo: steps (default 20)")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="about the time for all pairs (default 60)")
    parser.add_argument("--json", metavar="FILE", help="also write everything measured to this file")
    models = parser.add_rare_group("decode, train, mmdit; --size also for device")
    models.add_argument("--threads", type=int, metavar="N", help="cores that both sides use (default: all)")
    models.add_argument("--size", choices=("tiny", "small", "1b"), help="tiny or small: width 128 or 512; device: tiny or 1b (default)")
    grpo = parser.add_rare_group(
        "grpo; --model also for eval, tokenize, serve, window, scaling, start, decoder-price, --faults for rewards, serve"
    )
    grpo.add_argument("--model", metavar="DIR", help="model (default: the tiny one of the package)")
    grpo.add_argument("--config", metavar="FILE", help="its shapes, rewards (default: configs/tiny/demo.py)")
    grpo.add_argument("--faults", action="store_true", default=None, help="a run under faults instead")
    grpo.add_argument("--bodies", type=int, metavar="N", help="rewards: so many damaged requests instead")
    convert = parser.add_rare_group("convert only")
    convert.add_argument("--gb", type=float, metavar="GB", help="least size of the checkpoint (default 4)")
    convert.add_argument("--dir", metavar="DIR", help="disk with 4 times that (default: temporary folder)")


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Measures, prints the table, writes the JSON. ValueError (one sentence): missing extra, bad option, sides that differ."""
    in_a_checkout()
    from tests.benchmarks import machine
    from tests.benchmarks.timing import BenchError
    from xomni_jax.checkpoint.store import write_json

    if args.repeats < 1 or not args.seconds > 0:
        raise BenchError(f"--repeats {args.repeats} and --seconds {args.seconds:g} must be above 0")
    for option in ("size", "threads", "model", "config", "gb", "dir", "faults", "bodies"):
        if getattr(args, option) is not None and option not in _OPTIONS[args.name]:
            owners = ", ".join(name for name in NAMES if option in _OPTIONS[name])
            raise BenchError(f"--{option} belongs to bench {owners}; bench {args.name} does not take it")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise BenchError(f"--json {args.json}: there is no folder {Path(args.json).parent}; make it first")
    if args.threads is not None:
        machine.use_cores(args.threads)
    own = {"grpo": _grpo, "convert": _convert, "eval": _eval, "data": _data, "tokenize": _tokenize, "rewards": _rewards}
    own |= {"serve": _serve, "window": _window, "device": _device, "scaling": _scaling, "start": _start, "decoder-price": _decoder_price}
    report = own.get(args.name, _comparison)(args)
    print(report.text)
    if args.json:
        write_json(Path(args.json), report.data)
        print(f"written: {args.json}")
    return 0


def in_a_checkout() -> None:
    """Makes the benchmarks importable: they are part of the repository, not of the installed package.

    Raises:
      ValueError: the package was installed without its repository.
    """
    root = Path(__file__).parents[2]
    if not (root / "tests" / "benchmarks").is_dir():
        raise ValueError(
            "the benchmarks are not part of the installed package; run xomni bench from a checkout installed with pip install -e"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))


def _comparison(args: argparse.Namespace) -> Any:
    from tests.benchmarks import autoregressive, machine, mmdit, peers, report, timing

    module = mmdit if args.name == "mmdit" else autoregressive
    size = _size(args, module.SIZES, "tiny")
    torch = peers.need(args.name, module.PACKAGES)[0]
    others = machine.Others()
    if args.name == "mmdit":
        (title, cases), why = mmdit.cases(*mmdit.SIZES[size]), mmdit.REST
    elif args.name == "train":
        (title, cases), why = autoregressive.train_cases(autoregressive.SIZES[size]), autoregressive.TRAIN_REST
    else:
        (title, cases), why = autoregressive.decode_cases(autoregressive.SIZES[size]), autoregressive.DECODE_REST
    results = [timing.measure(case, args.repeats, args.seconds / len(cases)) for case in cases]
    threads = machine.xla_threads(), torch.get_num_threads()
    return report.comparison(args.name, title, results, module.PACKAGES, threads, others.cores(), why)


def _convert(args: argparse.Namespace) -> Any:
    from tests.benchmarks import convert
    from tests.benchmarks.timing import BenchError

    gb = 4.0 if args.gb is None else args.gb
    if not gb > 0:
        raise BenchError(f"--gb {gb:g} must be above 0")
    if args.dir and not Path(args.dir).is_dir():
        raise BenchError(f"--dir {args.dir}: there is no such folder; make it first")
    return convert.run(gb, args.dir, args.repeats, args.seconds)


def _eval(args: argparse.Namespace) -> Any:
    from tests.benchmarks import evaluation

    return evaluation.run(args.model or TINY_SFT)


def _data(args: argparse.Namespace) -> Any:
    from tests.benchmarks import data

    return data.run(400, args.repeats, args.seconds)


def _tokenize(args: argparse.Namespace) -> Any:
    from tests.benchmarks import tokenizing

    return tokenizing.run(args.model or TINY_SFT, args.repeats, args.seconds)


def _grpo(args: argparse.Namespace) -> Any:
    from tests.benchmarks import grpo

    return grpo.run(_grpo_config(args), args.repeats, args.seconds)


def _rewards(args: argparse.Namespace) -> Any:
    from tests.benchmarks import bodies, rewards
    from tests.benchmarks.timing import BenchError

    if args.bodies is not None:
        if args.bodies < 1:
            raise BenchError(f"--bodies {args.bodies} must be above 0")
        return bodies.run(args.bodies)
    return rewards.faults(_grpo_config(args), 1000, 60.0) if args.faults else rewards.run(args.repeats, args.seconds)


def _serve(args: argparse.Namespace) -> Any:
    from tests.benchmarks import serving

    return (serving.mixed if args.faults else serving.run)(args.model or TINY_SFT, args.seconds)


def _window(args: argparse.Namespace) -> Any:
    from tests.benchmarks import window

    return window.run(args.model or TINY_SFT, args.repeats, args.seconds)


def _device(args: argparse.Namespace) -> Any:
    from tests.benchmarks import device

    return device.run(_size(args, device.SIZES, "1b"), args.repeats, args.seconds)


def _scaling(args: argparse.Namespace) -> Any:
    from tests.benchmarks import scaling

    return scaling.run(str(Path(args.model or TINY_SFT).absolute()))


def _size(args: argparse.Namespace, sizes: Mapping[str, Any], default: str) -> str:
    """The chosen size. BenchError when this benchmark has none of that name."""
    from tests.benchmarks.timing import BenchError

    if (size := args.size or default) not in sizes:
        raise BenchError(f"--size {size}: bench {args.name} has the sizes {' and '.join(sizes)}")
    return size


def _decoder_price(args: argparse.Namespace) -> Any:
    from tests.benchmarks import decoder_price

    return decoder_price.run(_grpo_config(args))


def _start(args: argparse.Namespace) -> Any:
    from tests.benchmarks import start

    return start.run(args.model or TINY_SFT)


def _grpo_config(args: argparse.Namespace) -> Any:
    from tests.benchmarks import grpo
    from xomni_jax.checkpoint.store import read_model_json
    from xomni_jax.training.stage import load_config

    config = load_config(args.config or grpo.DEMO, [f"init_from={args.model or TINY_SFT}"])
    read_model_json(config.init_from)  # before any service is started
    return config
