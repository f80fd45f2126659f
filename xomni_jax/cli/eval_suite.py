"""xomni eval SUITE: one benchmark, or all whose data are there, from prompts to a result file."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xomni_jax.cli.inference import EXACT, add_drawing, add_model, positive, settle
from xomni_jax.evaluation.judges.opening import HELP
from xomni_jax.evaluation.suites import PUBLISHED, SUITES, get_suite, with_rewrites
from xomni_jax.evaluation.suites.choices import INSTRUCTIONS
from xomni_jax.evaluation.suites.rewriting import FORMS

EXAMPLE = "xomni eval rendered-text --model xomni_jax/assets/tiny_sft --out runs/rendered-text --limit 8"
_JUDGES = {"detector": "http://127.0.0.1:8003", "vqa": "Qwen/Qwen2.5-VL-7B-Instruct@http://127.0.0.1:8000/v1"}  # of examples
_PHASES = """\
Two phases, which may run apart and on different machines: --phase generate (or answer) runs the model, --phase score the judge or the
local rules. Both append what is finished, item by item: after an interruption of any kind the same command goes on. Several processes
share one OUT with --shard 1/N to N/N, at the same time or one after the other; whoever finishes last writes the results, which are the
same to the byte however the work was cut. Seeds are per item and repeat: --ids X in another OUT draws item X alone, to the bit the same.

OUT/report.html is a page with the scores beside the paper's and every item, OUT/results.csv a line per output. OUT/results.json has the
scores, counts and every setting, OUT/items.jsonl one line per item, OUT/images the images in the official layout.
--phase score also judges images of another program that lie there.
"""


def add_suites(kinds: Any) -> None:
    """A subcommand per suite, and `all`."""
    for name in SUITES:
        suite = get_suite(name)
        drawn = (
            f"{suite.repeats} image{'s' * (suite.repeats > 1)} per prompt" if suite.task == "generate" else "greedy answers, local rules"
        )
        facts = [f"{suite.published} items" * bool(suite.published), drawn, f"judge: {suite.judge}" if suite.judge else ""]
        lines = [f"{suite.title}: {', '.join(filter(None, facts))}."]
        lines += [f"--data must hold {suite.files}."] * bool(suite.files)
        lines += ["The official scorer's behaviour is the default; named departures from it:"] * bool(suite.switches)
        lines += [f"  --switch {switch}: {what}" for switch, what in suite.switches.items()]
        sub = _parser(kinds, name, suite.title, "\n".join(lines), _example_judge(suite.judge))
        judges = f"what judges the images: {HELP[suite.judge]}" if suite.judge else ""
        _add_options(sub, {suite.task}, bool(suite.files), judges, bool(suite.switches))
    about = "Runs every one whose data lie in DATA or DATA/SUITE, into OUT/SUITE; the others are named with what they need:\n"
    sub = _parser(kinds, "all", "every benchmark whose data are found", about + ", ".join(PUBLISHED) + ".")
    _add_options(sub, {"generate", "answer"}, True, "KIND=JUDGE, for each kind: " + "; ".join(f"{k}: {v}" for k, v in HELP.items()), True)


def _parser(kinds: Any, name: str, line: str, description: str, judge: str = "") -> argparse.ArgumentParser:
    example = EXAMPLE if name.startswith("rendered") else f"xomni eval {name} --model MODEL --data DATA --out runs/{name}{judge}"
    return kinds.add_parser(
        name,
        help=line,
        description=f"{description}\n\n{_PHASES}",
        epilog="example:\n  " + example.replace("rendered-text", name),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_options(parser: argparse.ArgumentParser, tasks: set[str], data: bool, judges: str, switches: bool) -> None:
    parser.add_argument("--out", required=True, metavar="OUT", help="directory of the run; the same one to go on")
    if data:
        parser.add_argument("--data", required=True, metavar="DATA", help="directory of the published files")
    parser.add_argument("--phase", choices=("all", *sorted(tasks, reverse=True), "score"), default="all", help="default: all")
    which = parser.add_argument_group("which items")
    which.add_argument("--limit", type=positive, metavar="N", help="the first N items only")
    which.add_argument("--ids", nargs="+", default=(), metavar="ID", help="these items only")
    which.add_argument(
        "--shard", type=_shard, default=(0, 1), metavar="K/N", help="this process is the K-th of N that share OUT (default 1/1)"
    )
    model = parser.add_argument_group("the model")
    add_model(model, f"; {EXACT}, and so does --shard", "fsdp=-1, all")
    what = "one of several processes that hold one model together, which JAX finds by itself (TPU slice, Slurm)"
    model.add_argument("--distributed", action="store_true", help=what)
    what = "images" if tasks == {"generate"} else "answers" if tasks == {"answer"} else "images or answers"
    at_a_time = f"{what} at a time, of each data-parallel part of the mesh (default 16)"
    model.add_argument("--batch", type=positive, metavar="N", help=at_a_time)
    if "generate" in tasks:
        drawing = parser.add_argument_group("drawing (the defaults are the released ones)")
        drawing.add_argument("--decode-batch", type=positive, metavar="N", help="images decoded to pixels at a time (default 16)")
        add_drawing(drawing)
        drawing.add_argument("--seed", type=_seed, default=1234, help="the released command's 1234 by default")
        if tasks == {"generate"}:
            drawing.add_argument("--rewrite", metavar="SOURCE", help=f"draw rewritten prompts, in both phases: {FORMS} (kept in OUT)")
    scoring = parser.add_argument_group("scoring")
    if judges:
        scoring.add_argument("--judge", action="append", metavar="JUDGE", help=judges)
    if switches:
        scoring.add_argument("--switch", action="append", metavar="NAME", help="a named departure from the official scorer, see above")
    wording = f"word an instruction as in FILE; there are {', '.join(INSTRUCTIONS)}"
    scoring.add_argument("--instruction", type=_instruction, action="append", default=[], metavar="NAME=FILE", help=wording)


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Runs the phases of one suite, or of all; the last line says where the results are."""
    from xomni_jax.cli.train import run_in_group
    from xomni_jax.core import distributed

    settle(args, rest)
    args.judges, args.switches = _judges(args), getattr(args, "switch", None) or []
    # Workers with shares of their own know nothing of each other; without, the processes of a slice hold one model together.
    alone = args.phase == "score" or args.shard[1] > 1
    settings = {f"--{name}": str(value) for name, value in vars(args).items() if name != "run"}
    group = None if alone else distributed.start(settings, args.distributed)
    if group is None:
        return _run(args, None)
    return run_in_group(group, lambda: _run(args, group), "eval")


def _run(args: argparse.Namespace, group: Any) -> int:
    from xomni_jax.core.preemption import StopRequested, StopSignal
    from xomni_jax.evaluation.session import ModelOptions, ModelSession
    from xomni_jax.sampling.logits import SamplingConfig

    if group is not None and args.phase == "all":
        raise ValueError(
            "several JAX processes make outputs together but do not score; add --phase generate or answer, then score in one process"
        )
    drawing = {}
    if hasattr(args, "seed"):
        sampling = SamplingConfig(args.temperature, args.top_k, args.top_p, args.min_p, args.guidance)
        drawing = {"height": args.height, "width": args.width, "seed": args.seed, "sampling": sampling, "decode_batch": args.decode_batch}
    args.session = ModelSession(ModelOptions(args.model, args.mesh, args.sections, batch=args.batch, **drawing))
    args.process = (0, 1) if group is None else (group.index, group.count)
    with StopSignal(group) as args.stop:
        try:
            return _run_all(args) if args.evaluation == "all" else _run_suite(args)
        except StopRequested:
            print("stopped; what is finished is kept, the same command goes on from there", file=sys.stderr)
            return 130


def _run_suite(args: argparse.Namespace) -> int:
    """The phases of one suite."""
    suite, instructions = get_suite(args.evaluation, args.switches, dict(args.instruction)), {**INSTRUCTIONS, **dict(args.instruction)}
    if rewrite := getattr(args, "rewrite", None):
        suite = with_rewrites(suite, rewrite, Path(args.out) / "rewritten.jsonl", instructions["rewrite"])
    work = _work(args, suite, getattr(args, "data", "."), args.out)
    results = _phases(args, work)
    if not results:
        print(_unfinished(args, work))
        return 0
    print(_summary(results, work))
    print(f"report: {work.run.path / 'report.html'}, one line per output: {work.run.path / 'results.csv'}")
    print(f"results: {work.run.path / 'results.json'}")
    return 0


def _run_all(args: argparse.Namespace) -> int:
    """The suites whose data are found; one that fails does not keep the others from running."""
    from xomni_jax.evaluation.suite import SuiteError

    absent, failed, unfinished, scored = [], [], [], []
    for name in PUBLISHED:
        suite = get_suite(name, [switch for switch in args.switches if switch in get_suite(name).switches], dict(args.instruction))
        if args.phase not in ("all", suite.task, "score"):
            continue
        data = Path(args.data) / name
        try:
            work = _work(args, suite, data if data.is_dir() else args.data, Path(args.out) / name)
        except SuiteError as e:
            absent.append(f"not run: {name}: {e}")
            continue
        try:
            results = _phases(args, work)
            (scored if results else unfinished).append(_summary(results, work) if results else _unfinished(args, work))
        except ValueError as e:
            if args.process[1] > 1:
                raise  # the others cannot know
            failed.append(f"failed: {name}: {e}")
    print("\n".join([*absent, *failed, *scored, *unfinished]))
    if scored:
        print(f"results: {Path(args.out)}/SUITE/results.json, the pages are beside them")
    return 2 if failed or not scored + unfinished else 0


def _work(args: argparse.Namespace, suite: Any, data: Any, out: Any) -> Any:
    from xomni_jax.evaluation import runner

    return runner.open_work(suite, data, out, args.limit, args.ids, args.shard, args.process, bool(getattr(args, "rewrite", None)))


def _phases(args: argparse.Namespace, work: Any) -> dict[str, Any] | None:
    """Runs what was asked for; the results once every worker's items are finished."""
    from xomni_jax.evaluation import runner
    from xomni_jax.evaluation.judges import open_judge
    from xomni_jax.evaluation.run_report import write_run_report

    scoring = args.phase in ("all", "score")
    # The judge comes first: that it is silent is better known before hours of drawing.
    judge = open_judge(work.suite.judge, args.judges.get(work.suite.judge)) if scoring and work.suite.judge else None
    try:
        if args.phase != "score":
            args.session.run(work, args.stop)
        if judge is not None:
            runner.judge_outputs(work, judge, args.stop)
    finally:
        if judge is not None:
            judge.close()
    left = runner.missing(work) if scoring else 0
    if left and judge is None and args.phase == "score":
        raise ValueError(f"{work.suite.name}: {left} of {len(work.items)} items are not answered in {work.run.path}; run --phase answer")
    if not scoring or left:
        return None
    switches = [switch for switch in args.switches if switch in work.suite.switches]
    results = runner.write_results(work, switches, dict(args.instruction))
    write_run_report(work.run.path, {item.id: item.image for item in work.items if item.image is not None})
    return results


def _judges(args: argparse.Namespace) -> dict[str, str]:
    """What --judge says, by kind of judge: KIND=JUDGE, or a bare JUDGE where there is one suite."""
    kinds = {}
    for text in getattr(args, "judge", None) or ():
        kind, named, spec = text.partition("=")
        if named and kind in HELP:
            kinds[kind] = spec
        elif args.evaluation == "all":
            raise ValueError(f"--judge {text}: several kinds of judges are asked; write KIND=JUDGE, with a kind of {', '.join(HELP)}")
        else:
            kinds[get_suite(args.evaluation).judge] = text
    return kinds


def _unfinished(args: argparse.Namespace, work: Any) -> str:
    """What was finished, where it lies and what comes next."""
    from xomni_jax.evaluation import runner

    suite, of, scoring = work.suite, len(work.items), args.phase in ("all", "score")
    if not work.writes:
        return f"{suite.name}: process {work.process[0]} is done"
    left = runner.missing(work, judged=scoring)
    verb = "judged" if scoring and suite.judge else "drawn" if suite.task == "generate" else "answered"
    done = f"{suite.name}: {of - left} of {of} items are {verb} in {work.run.path}"
    if scoring:
        return f"{done}; who finishes the last of them writes the results"
    if left:
        return f"{done}; the other shares of --shard hold the rest"
    judge = "" if suite.judge in args.judges else _example_judge(suite.judge, args.evaluation == "all")
    alone = " in one process" if work.process[1] > 1 else ""
    return f"{done}; {'judge' if suite.judge else 'score'} them with the same command and --phase score{judge}{alone}"


def _example_judge(kind: str | None, named: bool = False) -> str:
    """What a command needs to say about a judge that has no default."""
    return f" --judge {f'{kind}=' * named}{_JUDGES[kind]}" if kind in _JUDGES else ""


def _summary(results: Mapping[str, Any], work: Any) -> str:
    """The scores of a suite, and how many items they are made of."""
    counts, switches = results["counts"], results["switches"]
    of = f" of {counts['published']}" if counts["published"] else ""
    lines = [f"{results['title']}: {results['headline']['name']} {_digits(results['headline']['value'])}"]
    lines += [f"  {name}: {_digits(value)}" for name, value in results["scores"].items() if name != results["headline"]["name"]]
    lines += [f"  {name}: {_digits(c['score'])} ({c['items']} items)" for name, c in results["categories"].items()]
    lines += [f"  {counts['items']}{of} items, {counts['outputs']} outputs, each once; {counts['unparsed']} replies could not be read"]
    lines += [f"  {n} {name}" for name, n in counts.items() if name in ("overlong prompts", "fitted images") and n]
    lines += [f"  judge: {results['judge']['name']}"] if results["judge"] else []
    lines += [f"  switches: {', '.join(switches)}"] * bool(switches)
    return "\n".join([*lines, *(f"  {note}" for note in results["notes"])])


def _digits(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def _shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no share; write K/N with K from 1 to N, such as 1/2")
    return int(found[1]) - 1, int(found[2])


def _instruction(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if name not in INSTRUCTIONS or not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE with a file that exists and a name of {', '.join(INSTRUCTIONS)}")
    return name, Path(path).read_text(encoding="utf-8").rstrip("\n")


def _seed(text: str) -> int:
    if not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is no seed; give a number from 0 to {2**32 - 1}")
    return int(text)
