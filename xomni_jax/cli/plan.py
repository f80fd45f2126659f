"""xomni plan: does a run fit a slice, and what would it cost, before one is rented."""

from __future__ import annotations

import argparse
from pathlib import Path

from xomni_jax.core.config import ConfigError, read_overrides
from xomni_jax.planner import chips

DETAILS = """\
The TPU compiler itself compiles every program of a stage for the slice, without weights and without a TPU: minutes per program on one core.
Results are cached; the same plan then takes seconds.

programs: grpo has policy-update, reference (a part of it), layout, rollout, prefill (a part of it), decoder, text and vae (parts of it);
       tokenizer, pretrain, sft and decoder have one update each; inference has rollout, prefill, decoder, text, vae and answer.
       Those of grpo at further image sizes end in @HEIGHTxWIDTH, such as rollout@64x32.

Topologies other than cpu:N need the extra [plan]. Times are lower bounds from the hardware's peaks, not measurements; MFU, tokens and
images per second are upper bounds.
"""
EXAMPLE = """\
xomni plan --config=configs/xomni/grpo.py --topology=v6e-64 --program rollout --price 2.7
xomni plan --config=configs/xomni/generate.py --topology=v5litepod-8 --html plan.html
xomni plan --gates
xomni plan --config=configs/tiny/sft.py --topology=cpu:8 --config.next_token.rows=16"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's own options."""
    parser.add_argument("--config", metavar="FILE", help="a configuration of training or of inference; see configs/")
    parser.add_argument("--topology", metavar="NAME", help="v6e:8x8, or as rented: v6e-64, v5p-64, v5litepod-256; cpu:8 simulates")
    parser.add_argument("--program", action="append", metavar="NAME", help="one program; may be repeated (default: all)")
    parser.add_argument("--json", metavar="FILE", help="also write everything to this file")
    parser.add_argument("--html", metavar="FILE", help="also write the report as one page")
    parser.add_argument("--price", type=float, metavar="X", help="of one chip for an hour: adds what a step costs")
    parser.add_argument(
        "--reserve", type=float, default=chips.RESERVE, metavar="SHARE", help="of HBM that must stay free (default %(default)s)"
    )
    parser.add_argument("--cache", metavar="DIR", help="where results of compilations are kept (default ~/.cache/xomni_jax/plans)")
    parser.add_argument("--gates", action="store_true", help="check the released configurations, rewrite configs/xomni/README.md's table")


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Plans, prints the report, writes the files. ValueError (one sentence) for what cannot be planned."""
    overrides = read_overrides(rest)
    if not 0 <= args.reserve < 1:
        raise ConfigError(f"--reserve {args.reserve:g} is a share of HBM; give a number from 0 to below 1")
    if args.price is not None and not args.price > 0:
        raise ConfigError(f"--price {args.price:g} must be above 0")
    for path in filter(None, (args.json, args.html)):
        if not Path(path).resolve().parent.is_dir():
            raise ConfigError(f"{path}: there is no folder {Path(path).resolve().parent}; make it first")
    cache = Path(args.cache) if args.cache else Path.home() / ".cache" / "xomni_jax" / "plans"
    if args.gates:
        return run_gates(args, cache, overrides)
    if not args.config or not args.topology:
        raise ConfigError("--config and --topology are needed, such as --config=configs/xomni/grpo.py --topology=v6e-64 (or --gates alone)")
    topology = chips.parse(args.topology)
    chips.prepare(topology)
    from xomni_jax.training.stage import load_config

    config = load_config(args.config, overrides)
    from xomni_jax.checkpoint.store import write_json
    from xomni_jax.planner import report
    from xomni_jax.planner.plan import make_plan

    plan = make_plan(config, topology, args.program or ["all"], cache, args.reserve)
    print(report.text(plan, args.price), end="", flush=True)
    if args.json:
        write_json(Path(args.json), report.as_json(plan, args.price))
    if args.html:
        report.write_html(args.html, plan, args.price)
    print("written: " + ", ".join(filter(None, (args.json, args.html, f"{cache} (what was compiled)"))))
    return 0


def run_gates(args: argparse.Namespace, cache: Path, overrides: list[str]) -> int:
    """The gates, or those on one topology."""
    if args.config or args.program or overrides or args.json or args.html or args.price:
        raise ConfigError("--gates plans the released configurations as they are; beside it only --topology, --reserve and --cache")
    from xomni_jax.planner.gates import run as check_all

    print(f"written: {check_all(cache, args.topology, args.reserve)}")
    return 0
