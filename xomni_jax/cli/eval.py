"""xomni eval: the paper's benchmarks, and what reinforcement learning changed on held-out prompts."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from xomni_jax.cli import eval_study, eval_suite
from xomni_jax.core.registry import RegistryError
from xomni_jax.evaluation.suite import SuiteError
from xomni_jax.evaluation.suites import SUITES

EXAMPLE = eval_suite.EXAMPLE
_EFFECT_EXAMPLE = (
    "xomni eval effect --sft xomni_jax/assets/tiny_sft --rl runs/demo/grpo/model --rl-run runs/demo/grpo \\\n"
    "    --ocr http://127.0.0.1:8001 --shapes http://127.0.0.1:8002 --out runs/demo"
)
_EFFECT = """\
Draws held-out signs with a supervised model (SFT) and with the model GRPO made of it (RL), with and without guidance, reads every
image with the reward services, and compares: one RL sample, one SFT sample, SFT's best of 2, 4, 8 and 16, SFT at other
temperatures, and real images passed through the codes. Best-of-N picks with the reward that RL trains on and knows the wanted
text: an oracle. Start the services first, each in a terminal of its own:

  xomni serve-reward ocr --port 8001
  xomni serve-reward shapes --port 8002
  xomni serve-reward tesseract --port 8004      # a second opinion, optional: --second http://127.0.0.1:8004

Results: OUT/report.html (one page, opens anywhere), OUT/report.json (all numbers with 95% intervals), OUT/cells/*.npz (images
and scores). When it is interrupted, the same command goes on from the finished cells.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand per benchmark, `all`, the studies, and `effect`."""
    parser.add_argument("--paper-table", action="store_true", help="print the command behind each number of the paper's tables 1 to 4")
    parser.add_argument("--runs", metavar="DIR", help="with --paper-table: where finished runs are, to print their numbers beside")
    kinds = parser.add_subparsers(dest="evaluation", metavar="WHAT")
    words = [word for word in sys.argv[2:] if not word.startswith("-")]
    studies = (*eval_study.STUDIES, "effect")
    wanted = next((word for word in words if word in (*SUITES.names(), *studies, "all") or ".py:" in word), None)
    try:
        if wanted not in studies:
            eval_suite.add_suites(kinds, wanted)
    except (SuiteError, RegistryError) as e:
        parser.exit(2, f"xomni eval: {e}\n")
    eval_study.add_studies(kinds)
    effect = kinds.add_parser(
        "effect",
        help="what reinforcement learning changed: SFT against RL",
        description=_EFFECT,
        epilog="example:\n  " + _EFFECT_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = effect.add_argument_group("what is compared")
    what.add_argument("--sft", required=True, metavar="DIR", help="model directory of the supervised model")
    what.add_argument("--rl", required=True, metavar="DIR", help="model directory after GRPO, such as RUN/model; same decoder as --sft")
    what.add_argument(
        "--rl-run", metavar="RUN", help="the GRPO run with metrics.jsonl and config.json (default: the folder that holds --rl)"
    )
    services = effect.add_argument_group("reward services (several URLs of one: separated by commas)")
    services.add_argument("--ocr", required=True, metavar="URL", help="text recognition, as in training")
    services.add_argument("--shapes", metavar="URL", help="colour of the ground; without it colour accuracy is null")
    services.add_argument(
        "--second", metavar="URL", help="tesseract, a reader that took no part in training; without it that column is null"
    )
    how = effect.add_argument_group("how much")
    how.add_argument("--prompts", type=int, default=64, metavar="N", help="held-out signs, no two alike (default 64)")
    how.add_argument("--samples", type=int, default=16, metavar="N", help="SFT samples per sign, the largest best-of-N (default 16)")
    how.add_argument("--rl-samples", type=int, default=4, metavar="N", help="RL samples per sign, averaged (default 4)")
    how.add_argument(
        "--sweep-samples", type=int, default=4, metavar="N", help="SFT samples per sign and temperature of the sweep (default 4)"
    )
    how.add_argument("--size", type=_size, default=(32, 64), metavar="HxW", help="pixels, height x width (default 32x64)")
    how.add_argument("--lengths", type=_lengths, default=(3, 6), metavar="A-B", help="least and most characters of a sign (default 3-6)")
    how.add_argument("--seed", type=int, default=0, help="of signs, samples and decoder noise (default 0)")
    how.add_argument("--chunk", type=int, default=128, metavar="N", help="images decoded at a time (default 128)")
    sampling = effect.add_argument_group("sampling (the defaults are those of the rollouts in training)")
    sampling.add_argument("--guidance", type=float, default=2.0, help='of the setting "guidance on"; off is always measured (default 2)')
    sampling.add_argument("--temperature", type=float, default=1.0, help="of all samples but the sweep (default 1)")
    sampling.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K likeliest codes; 0 is off (default 0)")
    sampling.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="keep the likeliest codes that make up P; 1 is off (default 1)"
    )
    sampling.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="keep codes of at least P times the likeliest; 0 is off (default 0)"
    )
    sampling.add_argument(
        "--temperatures",
        type=_numbers,
        default=(1.0, 0.7, 0.5, 0.3, 0.0),
        metavar="T,T,...",
        help="of the sweep over SFT (default 1,0.7,0.5,0.3,0)",
    )
    out = effect.add_argument_group("report")
    out.add_argument("--out", required=True, metavar="OUT", help="directory of the results, such as runs/demo")
    out.add_argument(
        "--started", type=float, metavar="UNIX", help="`date +%%s` at the start of the whole job, for wall_seconds (default: now)"
    )
    out.add_argument("--first-image", type=_first_image, metavar="S|FILE", help="seconds until the first image, or a file that holds them")


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Runs the evaluation that was asked for."""
    if args.paper_table:
        from xomni_jax.evaluation.paper_table import find_runs, rows, table_text

        print(table_text(rows(find_runs(args.runs) if args.runs else ())))
        return 0
    if args.evaluation is None:
        raise ValueError("say what to evaluate, such as rendered-text, or give --paper-table; xomni eval --help lists all")
    if args.evaluation in eval_study.STUDIES:
        return eval_study.run(args)
    return _effect(args) if args.evaluation == "effect" else eval_suite.run(args, rest)


def _effect(args: argparse.Namespace) -> int:
    """Measures, prints the tables, writes both reports."""
    from xomni_jax.evaluation.effect import EffectConfig, open_services, run_effect
    from xomni_jax.evaluation.report import write_report
    from xomni_jax.evaluation.summary import table_text

    began = time.time()
    names = ("sft", "rl", "out", "prompts", "samples", "rl_samples", "sweep_samples", "guidance", "size", "lengths", "seed")
    names += ("temperature", "top_k", "top_p", "min_p", "temperatures", "chunk")
    config = EffectConfig(rl_run=args.rl_run or str(Path(args.rl).absolute().parent), **{name: getattr(args, name) for name in names})
    try:
        with open_services({role: getattr(args, role) for role in ("ocr", "shapes", "second")}) as (clients, versions):
            effect, report = run_effect(config, clients, versions, args.started or began, args.first_image)
    except KeyboardInterrupt:
        print(
            f"\ninterrupted; finished parts are in {Path(args.out) / 'cells'}, the same command goes on from there",
            file=sys.stderr,
        )
        return 130
    path = write_report(effect, report, Path(args.out) / "report.html")
    print("\n" + table_text(report) + "\n".join(report["notes"]) + f"\n\nnumbers: {path.with_suffix('.json')}\nreport:  {path.absolute()}")
    return 0


def _size(text: str) -> tuple[int, int]:
    return _pair(text, "x", "32x64")


def _lengths(text: str) -> tuple[int, int]:
    return _pair(text, "-", "3-6")


def _pair(text: str, separator: str, example: str) -> tuple[int, int]:
    parts = text.split(separator)
    if len(parts) != 2 or not all(p.isdigit() for p in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not two numbers; write it like {example}")
    return int(parts[0]), int(parts[1])


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers; write it like 1,0.5,0") from None


def _first_image(text: str) -> float:
    path = Path(text)
    try:
        return float(path.read_text() if path.is_file() else text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of seconds nor a file that holds one") from None
