"""xomni eval guidance and best-of-n: studies over finished runs; xomni eval effect: SFT against RL, drawn and measured."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from pathlib import Path
from typing import Any

from xomni_jax.cli.eval_suite import add_command

STUDIES = ("guidance", "best-of-n", "effect")
GUIDANCE_EXAMPLE = "xomni eval guidance runs/off runs/on --out runs/guidance"
BEST_EXAMPLE = "xomni eval best-of-n --sft runs/sft --rl runs/rl --out runs/best-of-n"
_GUIDANCE = """\
Takes runs of one suite by one model that differ in --guidance alone, one of them off (1), and says what guidance changes: the suite's
number, the mean score of an item with 95% intervals, differences to guidance off paired by item. When a run is missing, the command
that makes it is printed. For example, on the tiny model:

  xomni eval rendered-text --out runs/off
  xomni eval rendered-text --guidance 2 --out runs/on

Results: OUT/guidance.html (table and plot), OUT/guidance.json, OUT/guidance.csv.
"""
_BEST = """\
Sets one sample of the model after reinforcement learning (RL) against the best of N = 1, 2, 4, 8, 16 samples of the supervised one (SFT),
picked by a reward, on the items of any suite that draws. Runs of one model with different --seed are pooled: four runs of four images
per prompt give N = 16. When a run is missing, the command that makes it is printed. For example:

  xomni eval rendered-text --model SFT --out runs/sft-1
  xomni eval rendered-text --model SFT --seed 1235 --out runs/sft-2
  xomni eval rendered-text --model RL --out runs/rl

--reward score picks with the suite's own score, an oracle; --reward NAME=URL asks a running reward service (xomni serve-reward NAME),
which is told the fields of an item, such as "text", as its targets.

Results: OUT/best_of_n.html (table and plot), OUT/best_of_n.json, OUT/best_of_n.csv.
"""

EFFECT_EXAMPLE = (
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

Results: OUT/report.html (one page, opens anywhere), OUT/report.json (all numbers with 95% intervals), OUT/cells/NAME (the run of each
measurement: images and replies). When it is interrupted, the same command goes on from the finished parts.
"""
_HOW_MUCH = ("prompts", "samples", "rl_samples", "sweep_samples", "size", "lengths", "seed", "chunk")
_SAMPLING = ("guidance", "temperature", "top_k", "top_p", "min_p", "temperatures")


def add_studies(kinds: Any, wanted: str | None) -> None:
    """The subcommands guidance and best-of-n, and effect unless another one is wanted."""
    if wanted in (None, "effect"):
        _add_effect(kinds)
    guidance = add_command(kinds, "guidance", "what guidance changes: runs with it off and on", _GUIDANCE, GUIDANCE_EXAMPLE)
    guidance.add_argument("runs", nargs="+", metavar="RUN", help="run directories, one per guidance value")
    best = add_command(kinds, "best-of-n", "one RL sample against the best of N SFT samples", _BEST, BEST_EXAMPLE)
    best.add_argument("--sft", nargs="+", required=True, metavar="RUN", help="runs of the supervised model, each with another seed")
    best.add_argument("--rl", nargs="+", required=True, metavar="RUN", help="runs of the model after RL, each with another seed")
    best.add_argument(
        "--reward", type=_reward, default=("score", ""), metavar="score|NAME=URL", help="what chooses the best sample (default score)"
    )
    for parser in (guidance, best):
        parser.add_argument("--out", required=True, metavar="OUT", help="folder of the results")
        parser.add_argument("--bootstrap-seed", type=int, default=0, metavar="N", help="seed of the bootstrap intervals (default 0)")


def _add_effect(kinds: Any) -> None:
    from xomni_jax.core.config import explanations
    from xomni_jax.evaluation.effect import EffectConfig

    says = explanations(EffectConfig)
    parser = add_command(kinds, "effect", "what reinforcement learning changed: SFT against RL", _EFFECT, EFFECT_EXAMPLE)
    what = parser.add_argument_group("what is compared")
    what.add_argument("--sft", required=True, metavar="DIR", help=says["sft"])
    what.add_argument("--rl", required=True, metavar="DIR", help=says["rl"])
    what.add_argument("--rl-run", metavar="RUN", help=f"{says['rl_run']} (default: the folder that holds --rl)")
    services = parser.add_argument_group("reward services (several URLs of one: separated by commas)")
    services.add_argument("--ocr", required=True, metavar="URL", help="text recognition, as in training")
    services.add_argument("--shapes", metavar="URL", help="colour of the ground; without it colour accuracy is null")
    services.add_argument(
        "--second", metavar="URL", help="tesseract, a reader that took no part in training; without it that column is null"
    )
    # How an option that is no plain number is read, its metavar and its default.
    special = {
        "size": (functools.partial(_pair, "x", "32x64"), "HxW", "32x64"),
        "lengths": (functools.partial(_pair, "-", "3-6"), "A-B", "3-6"),
        "temperatures": (_numbers, "T,T,...", "1,0.7,0.5,0.3,0"),
    }
    for title, names in (("how much", _HOW_MUCH), ("sampling (the defaults are those of the rollouts in training)", _SAMPLING)):
        group = parser.add_rare_group(title)
        for name in names:
            default = getattr(EffectConfig, name)
            kind, metavar, shown = special.get(name) or (type(default), "N" if isinstance(default, int) else "X", f"{default:g}")
            option = f"--{name.replace('_', '-')}"
            group.add_argument(option, type=kind, default=default, metavar=metavar, help=f"{says[name]} (default {shown})")
    out = parser.add_argument_group("report")
    out.add_argument("--out", required=True, metavar="OUT", help=says["out"])
    out.add_argument(
        "--started", type=float, metavar="UNIX", help="`date +%%s` at the start of the whole job, for wall_seconds (default: now)"
    )
    out.add_argument("--first-image", type=_first_image, metavar="S|FILE", help="seconds until the first image, or a file that holds them")


def run(args: argparse.Namespace) -> int:
    """Prints the table, writes the files."""
    if args.evaluation == "effect":
        return _effect(args)
    from xomni_jax.evaluation.studies import study_text, write_study

    study, name = (_guidance(args), "guidance") if args.evaluation == "guidance" else (_best_of(args), "best_of_n")
    print(study_text(study, name))
    print(f"report: {write_study(study, name, args.out).absolute()}")
    return 0


def _guidance(args: argparse.Namespace) -> dict[str, Any]:
    from xomni_jax.evaluation.studies import guidance_study, read_runs

    return guidance_study(read_runs(args.runs, [{"guidance": "G"}] * len(args.runs)), args.bootstrap_seed)


def _best_of(args: argparse.Namespace) -> dict[str, Any]:
    from xomni_jax.evaluation.reward_scores import reward_scores
    from xomni_jax.evaluation.studies import best_of_study, read_runs
    from xomni_jax.rewards.client import RewardClient

    changes = [{"model": model, "seed": 1234 + i} for model, runs in (("SFT", args.sft), ("RL", args.rl)) for i in range(len(runs))]
    runs = read_runs([*args.sft, *args.rl], changes)
    sft, rl = runs[: len(args.sft)], runs[len(args.sft) :]
    name, url = args.reward
    if not url:
        return best_of_study(sft, rl, seed=args.bootstrap_seed)
    with RewardClient(name, url.split(","), max_wait=900.0) as client:
        version = client.versions()
        values_PR = reward_scores(sft, client, version, Path(args.out) / f"reward_{name}")
    return best_of_study(sft, rl, f"{name} ({version})", values_PR, args.bootstrap_seed)


def _effect(args: argparse.Namespace) -> int:
    from xomni_jax.checkpoint.store import read_model_json
    from xomni_jax.evaluation.effect import EffectConfig, open_services
    from xomni_jax.evaluation.effect_page import write_report
    from xomni_jax.evaluation.effect_summary import run_effect, table_text

    began = time.time()
    if not args.rl_run:
        read_model_json(args.rl)  # whose folder is otherwise looked up first, for the curves of the training
    given = {name: value for name, value in vars(args).items() if name in EffectConfig.__dataclass_fields__}
    config = EffectConfig(**given | {"rl_run": args.rl_run or str(Path(args.rl).absolute().parent)})
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


def _reward(text: str) -> tuple[str, str]:
    name, _, url = text.partition("=")
    if text != "score" and not (name and url.startswith(("http://", "https://"))):
        raise argparse.ArgumentTypeError(f"{text!r} is neither score nor NAME=URL; write it like ocr=http://127.0.0.1:8001")
    return name, url


def _pair(separator: str, example: str, text: str) -> tuple[int, int]:
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
