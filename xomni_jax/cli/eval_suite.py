"""xomni eval SUITE: one benchmark, or all whose data exist, from prompts to a result file."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xomni_jax.cli.inference import EXACT, add_adapter, add_drawing, add_model, positive, settle, share
from xomni_jax.cli.parser import Parser
from xomni_jax.core.config import explanations
from xomni_jax.evaluation.judges import HELP
from xomni_jax.evaluation.judges.preparation import ChatOptions
from xomni_jax.evaluation.run import EvalConfig
from xomni_jax.evaluation.suite import INSTRUCTIONS
from xomni_jax.evaluation.suites import FURTHER, GROUPS, SUITES, get_suite

if TYPE_CHECKING:
    from xomni_jax.evaluation.run import AllResults, Results

EXAMPLE = "xomni eval rendered-text --model xomni_jax/assets/tiny_sft --out runs/rendered-text --limit 8"
_CHAT = "Qwen/Qwen2.5-VL-7B-Instruct@http://127.0.0.1:8000/v1"
_JUDGES = {"detector": "http://127.0.0.1:8003", "vqa": _CHAT, "chat": _CHAT, "measure": "NAME@http://127.0.0.1:8005"}  # of examples
_PHASES = """\
There are two phases, which may run apart and on different machines: --phase generate (or answer) runs the model, --phase score the judge
or the local rules. Both store every finished item: after an interruption of any kind the same command continues. Several processes share
one OUT with --shard 1/N to N/N, at the same time or one after the other; the last to finish writes the results, which are the same to the
byte however the work was cut. Seeds belong to an item and repeat: --ids X with another OUT draws item X alone, equal to the bit.

OUT/report.html is a page with the scores beside the paper's and every item, OUT/results.csv has a line per output. OUT/results.json has
the scores, counts and every setting, OUT/items.jsonl one line per item, OUT/images the images in the official layout.
--phase score also judges images that another program has put there.
"""


def add_suites(kinds: Any, wanted: str | None) -> None:
    """The subcommand of the wanted suite or group, or without one those of all; a suite is imported for its help."""
    for name in SUITES.names() if wanted is None else () if wanted in GROUPS else (wanted,):
        _add_suite(kinds, name)
    if wanted in (None, "rendered"):
        about = "Prints what the tiny model can do, on held-out signs and shapes: spelling, shapes, reading and answering, by runs of\n"
        sub = _parser(kinds, "rendered", "the three suites of rendered images", about + f"{', '.join(GROUPS['rendered'])}, into OUT/SUITE.")
        _add_options(sub, {"generate", "answer"}, False, "", False)
    if wanted in (None, "all"):
        about = "Runs every one whose data lie in DATA or DATA/SUITE, into OUT/SUITE; the others are named with what they need:\n"
        sub = _parser(kinds, "all", "every benchmark whose data are found", about + ", ".join(GROUPS["all"]) + ".")
        sub.details += "\nKinds of judges:\n" + "\n".join(f"  {kind}: {what}" for kind, what in HELP.items())
        _add_options(sub, {"generate", "answer"}, True, f"KIND=JUDGE, for each kind of {', '.join(HELP)}; --help-all explains them", True)


def _add_suite(kinds: Any, name: str) -> None:
    suite = get_suite(name)
    drawn = f"{suite.repeats} image{'s' * (suite.repeats > 1)} per prompt" if suite.task == "generate" else "greedy answers, local rules"
    about = [f"{suite.published} items" * bool(suite.published), drawn, f"judge: {suite.judge}" if suite.judge else ""]
    lines = [f"{suite.title}: {', '.join(filter(None, about))}."]
    lines += [f"The published numbers are judged by {suite.official_judge}."] * bool(suite.official_judge)
    lines += [f"--data must hold {suite.files}."] * bool(suite.files)
    lines += [f"Sizes and checksums: xomni data fetch {name}"] * bool(getattr(suite, "downloads", ()))
    lines += ["The official scorer's behaviour is the default; named departures from it:"] * bool(suite.switches)
    lines += [f"  --switch {switch}: {what}" for switch, what in suite.switches.items()]
    sub = _parser(kinds, name, suite.title if name not in FURTHER else "", "\n".join(lines), _example_judge(suite.judge))
    kind = suite.judge or suite.fallback
    judges = f"what judges the {'images' if suite.judge else 'answers that rules cannot read'}: {HELP[kind]}" if kind else ""
    _add_options(sub, {suite.task}, bool(suite.files), judges, bool(suite.switches))


def add_command(kinds: Any, name: str, line: str, description: str, example: str) -> argparse.ArgumentParser:
    """The parser of one subcommand of `xomni eval`; without a `line` the list of subcommands leaves it out."""
    first, _, details = description.partition("\n\n")
    parser = kinds.add_parser(name, description=first, epilog="example:\n  " + example, **({"help": line} if line else {}))
    parser.details = details
    return parser


def _parser(kinds: Any, name: str, line: str, description: str, judge: str = "") -> argparse.ArgumentParser:
    example = EXAMPLE if name.startswith("rendered") else f"xomni eval {name} --model MODEL --data DATA --out runs/{name}{judge}"
    return add_command(kinds, name, line, f"{description}\n\n{_PHASES}", example.replace("rendered-text", name))


def _add_options(parser: argparse.ArgumentParser, tasks: set[str], data: bool, judges: str, switches: bool) -> None:
    says = explanations(EvalConfig)
    parser.add_argument("--out", required=True, metavar="OUT", help=says["out"])
    if data:
        parser.add_argument("--data", required=True, metavar="DATA", help="directory of the published files")
    parser.add_argument(
        "--phase", choices=("all", *sorted(tasks, reverse=True), "score"), default=EvalConfig.phase, help=says["phase"] + " (default)"
    )
    which = parser.add_argument_group("which items")
    which.add_argument("--limit", type=positive, metavar="N", help="evaluate the first N items only")
    which.add_argument("--sample", type=positive, metavar="N", help=says["sample"])
    parts = parser.add_rare_group("parts of the work")
    parts.add_argument("--ids", nargs="+", default=(), metavar="ID", help=says["ids"])
    parts.add_argument(
        "--shard", type=share, default=(0, 1), metavar="K/N", help="this process is the K-th of N that share OUT (default 1/1)"
    )
    model = parser.add_rare_group("the model")
    add_model(model, f"; {EXACT}, and so does --shard", "fsdp=-1, all")
    add_adapter(model)
    what = "one of several processes that hold one model together, which JAX finds by itself (TPU slice, Slurm)"
    model.add_argument("--distributed", action="store_true", help=what)
    what = "images" if tasks == {"generate"} else "answers" if tasks == {"answer"} else "images or answers"
    at_a_time = f"{what} at a time, of each data-parallel part of the mesh (default 16)"
    model.add_argument("--batch", type=positive, metavar="N", help=at_a_time)
    if "answer" in tasks:
        answers = "answers of another program in place of a model: a jsonl, json, csv or tsv file with the fields id and answer"
        model.add_argument("--answers", metavar="FILE", help=f"{answers}; --model MODEL@URL asks an OpenAI-compatible endpoint")
    if "generate" in tasks:
        images = (
            "images of another program in place of a model, named ID_K.png (.jpg, .webp), K from 0, ID the item's id or position from 0"
        )
        model.add_argument("--images", metavar="DIR", help=f"{images}; ID.png holds all as the tiles of a square")
        drawing = parser.add_rare_group("drawing (the defaults are the released ones)")
        drawing.add_argument("--decode-batch", type=positive, metavar="N", help="images decoded to pixels at a time (default 16)")
        add_drawing(drawing)
        drawing.add_argument("--repeats", type=positive, metavar="N", help="images per prompt (default: as the suite has it)")
        drawing.add_argument("--seed", type=_seed, default=EvalConfig.seed, help=f"{says['seed']} ({EvalConfig.seed})")
        if tasks == {"generate"}:
            from xomni_jax.evaluation.suites.rewriting import FORMS

            drawing.add_argument("--rewrite", metavar="SOURCE", help=f"draw rewritten prompts, in both phases: {FORMS} (kept in OUT)")
    _add_scoring(parser, judges, switches)


def _add_scoring(parser: Parser, judges: str, switches: bool) -> None:
    scoring, asking = parser.add_argument_group("scoring"), parser.add_rare_group("how judges are asked")
    says, chat, how = explanations(EvalConfig), explanations(ChatOptions), ChatOptions()
    scoring.add_argument("--official", action="store_true", help=f"{says['official']}; images are of the published size")
    if judges:
        scoring.add_argument("--judge", action="append", metavar="JUDGE", help=judges)
    asking.add_argument("--concurrency", type=positive, metavar="N", help=f"{chat['concurrency']} ({how.concurrency})")
    asking.add_argument("--image-format", choices=("PNG", "JPEG", "WEBP"), help=chat["image_format"])
    thinking = f"{chat['thinking_tokens']} ({how.thinking_tokens})"
    asking.add_argument("--thinking-tokens", type=positive, metavar="N", help=thinking)
    if switches:
        scoring.add_argument("--switch", action="append", metavar="NAME", help="a named departure from the official scorer, see above")
    wording = f"word an instruction as in FILE; there are {', '.join(INSTRUCTIONS)}"
    asking.add_argument("--instruction", type=_instruction, action="append", default=[], metavar="NAME=FILE", help=wording)


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Evaluates one suite, or all; the last line says where the results are."""
    from xomni_jax.cli.train import run_in_group
    from xomni_jax.core import distributed

    settle(args, rest)
    config = _config(args)
    # Workers with shares of their own know nothing of each other; without shares, the processes of a slice hold one model together.
    alone = args.phase == "score" or args.shard[1] > 1
    options = {f"--{name}": str(value) for name, value in vars(args).items() if name != "run"}
    group = None if alone else distributed.start(options, args.distributed)
    if group is None:
        return _evaluate(config, None)
    return run_in_group(group, lambda: _evaluate(config, group), "eval")


def _config(args: argparse.Namespace) -> EvalConfig:
    """What the options say."""
    from xomni_jax.inference import InferenceConfig

    given = vars(args)
    own = {name: given[name] for name in InferenceConfig.__dataclass_fields__ if name in given and name != "mesh"}
    same = {field.name for field in dataclasses.fields(EvalConfig)} & set(given)
    chat = {name: value for name in ChatOptions.__dataclass_fields__ if (value := given.get(name))}
    return EvalConfig(
        suite=args.evaluation,
        inference=dataclasses.replace(args.sections or InferenceConfig(), **own),
        components=args.sections is not None,
        judges=_judges(args.evaluation, given.get("judge") or ()),
        switches=given.get("switch") or (),
        instructions=dict(args.instruction),
        chat=ChatOptions(**chat),
        **{name: given[name] for name in same},
    )


def _judges(name: str, given: list[str]) -> dict[str, str]:
    """Kind of judge -> which: --judge KIND=JUDGE, or a bare JUDGE where there is one suite."""
    kinds = {}
    for text in given:
        kind, named, spec = text.partition("=")
        if named and kind in HELP:
            kinds[kind] = spec
        elif name in GROUPS:
            raise ValueError(f"--judge {text}: several kinds of judges are asked; write KIND=JUDGE, with a kind of {', '.join(HELP)}")
        else:
            suite = get_suite(name)
            kinds[suite.judge or suite.fallback] = text
    return kinds


def _evaluate(config: EvalConfig, group: Any) -> int:
    from xomni_jax.core.preemption import StopRequested, StopSignal
    from xomni_jax.evaluation.run import evaluate, evaluate_all

    if group is not None and config.phase == "all":
        raise ValueError(
            "several JAX processes make outputs together but do not score; add --phase generate or answer, then score in one process"
        )
    process = (0, 1) if group is None else (group.index, group.count)
    with StopSignal(group) as stop:
        try:
            if config.suite in GROUPS:
                return _print_all(config, evaluate_all(config, stop, process))
            return _print(evaluate(config, stop=stop, process=process))
        except StopRequested:
            print("stopped; what is finished is kept, the same command goes on from there", file=sys.stderr)
            return 130


def _print(results: Results) -> int:
    if results.values is None:
        print(_unfinished(results))
        return 0
    path = results.run.path
    print(_summary(results))
    print(f"report: {path / 'report.html'}, one line per output: {path / 'results.csv'}")
    print(f"results: {path / 'results.json'}")
    return 0


def _print_all(config: EvalConfig, found: AllResults) -> int:
    scored = [_summary(results) for results in found.done if results.values]
    unfinished = [_unfinished(results, named=True) for results in found.done if not results.values]
    absent = [f"not run: {name}: {why}" for name, why in found.absent.items()]
    failed = [f"failed: {name}: {why}" for name, why in found.failed.items()]
    print("\n".join([*absent, *failed, *scored, *unfinished]))
    if scored:
        print(f"results: {config.out}/SUITE/results.json, the pages are beside them")
    return 2 if failed or not found.done else 0


def _unfinished(results: Results, named: bool = False) -> str:
    """What is finished, where it lies, and what comes next. `named`: --judge must name its kind."""
    run, left = results.run, results.missing
    suite, of = run.suite, len(run.items)
    if not run.writes:
        return f"{suite.name}: process {run.process[0]} is done"
    verb = "judged" if run.scores and suite.judge else "drawn" if suite.task == "generate" else "answered"
    done = f"{suite.name}: {of - left} of {of} items are {verb} in {run.path}"
    if run.scores:
        return f"{done}; who finishes the last of them writes the results"
    if left:
        return f"{done}; the other shares of --shard hold the rest"
    judge = "" if suite.judge in run.config.judges else _example_judge(suite.judge, named)
    alone = " in one process" if run.process[1] > 1 else ""
    return f"{done}; {'judge' if suite.judge else 'score'} them with the same command and --phase score{judge}{alone}"


def _example_judge(kind: str | None, named: bool = False) -> str:
    """What a command needs to say about a judge that has no default."""
    return f" --judge {f'{kind}=' * named}{_JUDGES[kind]}" if kind in _JUDGES else ""


def _summary(results: Results) -> str:
    """The scores of a suite, and how many items they are made of."""
    values: Mapping[str, Any] = results.values
    counts, switches = values["counts"], values["switches"]
    of = f" of {counts['published']}" if counts["published"] else ""
    head, comparable = values["headline"], values["comparable"]
    error = f", standard error {_digits(head['stderr'])}" if head["stderr"] is not None else ""
    lines = [f"{values['title']}: {head['name']} {_digits(head['value'])}{error}"]
    lines += [f"  comparable: {'yes' if comparable['yes'] else 'no, because: ' + '; '.join(comparable['because'])}"]
    lines += [f"  {name}: {_digits(value)}" for name, value in values["scores"].items() if name != values["headline"]["name"]]
    lines += [f"  {name}: {_digits(c['score'])} ({c['items']} items)" for name, c in values["categories"].items()]
    lines += [f"  {counts['items']}{of} items, {counts['outputs']} outputs, each once; {counts['unparsed']} replies could not be read"]
    lines += [f"  {n} {name}" for name, n in counts.items() if name not in ("items", "published", "outputs", "unparsed") and n]
    lines += [f"  judge: {values['judge']['name']}"] if values["judge"] else []
    lines += [f"  switches: {', '.join(switches)}"] * bool(switches)
    return "\n".join([*lines, *(f"  {note}" for note in values["notes"])])


def _digits(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def _instruction(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if name not in INSTRUCTIONS or not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE with a file that exists and a name of {', '.join(INSTRUCTIONS)}")
    return name, Path(path).read_text(encoding="utf-8").rstrip("\n")


def _seed(text: str) -> int:
    if not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is no seed; give a number from 0 to {2**32 - 1}")
    return int(text)
