"""xomni eval guidance and xomni eval best-of-n: studies over finished runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

STUDIES = ("guidance", "best-of-n")
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


def add_studies(kinds: Any) -> None:
    """The subcommands guidance and best-of-n."""
    guidance = _parser(kinds, "guidance", "what guidance changes: runs with it off and on", _GUIDANCE, GUIDANCE_EXAMPLE)
    guidance.add_argument("runs", nargs="+", metavar="RUN", help="run directories, one per guidance value")
    best = _parser(kinds, "best-of-n", "one RL sample against the best of N SFT samples", _BEST, BEST_EXAMPLE)
    best.add_argument("--sft", nargs="+", required=True, metavar="RUN", help="runs of the supervised model, seeds apart")
    best.add_argument("--rl", nargs="+", required=True, metavar="RUN", help="runs of the model after RL, seeds apart")
    best.add_argument("--reward", type=_reward, default=("score", ""), metavar="score|NAME=URL", help="what picks the best (default score)")
    for parser in (guidance, best):
        parser.add_argument("--out", required=True, metavar="OUT", help="folder of the results")
        parser.add_argument("--bootstrap-seed", type=int, default=0, metavar="N", help="of the intervals (default 0)")


def run(args: argparse.Namespace) -> int:
    """Prints the table, writes the files."""
    from xomni_jax.evaluation import study_page

    if args.evaluation == "guidance":
        study, name, text = _guidance(args), "guidance", study_page.guidance_text
    else:
        study, name, text = _best_of(args), "best_of_n", study_page.best_of_text
    print(text(study))
    print(f"report: {study_page.write_study(study, name, args.out).absolute()}")
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
        values_PR = reward_scores(sft, client, version, Path(args.out) / f"reward_{name}.jsonl")
    return best_of_study(sft, rl, f"{name} ({version})", values_PR, args.bootstrap_seed)


def _reward(text: str) -> tuple[str, str]:
    name, _, url = text.partition("=")
    if text != "score" and not (name and url.startswith(("http://", "https://"))):
        raise argparse.ArgumentTypeError(f"{text!r} is neither score nor NAME=URL; write it like ocr=http://127.0.0.1:8001")
    return name, url


def _parser(kinds: Any, name: str, line: str, description: str, example: str) -> argparse.ArgumentParser:
    return kinds.add_parser(
        name,
        help=line,
        description=description,
        epilog="example:\n  " + example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
