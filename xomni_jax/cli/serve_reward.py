"""`xomni serve-reward SCORER --port P`: run one scoring service."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from typing import Any

from xomni_jax.cli.parser import Parser
from xomni_jax.core.options import add_flags
from xomni_jax.rewards.scorer import SCORERS, scorer_class
from xomni_jax.rewards.server import ServiceConfig, ServiceOptions
from xomni_jax.rewards.serving import serve

DETAILS = f"""\
A service scores images over HTTP for the trainer and the evaluations. GET /health reports its state, /ready whether it is loaded,
/metrics its counts for Prometheus. If XOMNI_REWARD_TOKEN is set, clients must have the same token. The scorers:

{chr(10).join(f"{name:<22}{line}" for name, line in SCORERS.summaries().items())}

A scorer of your own is path/to/my_scorer.py:MyScorer, see xomni_jax/rewards/README.md.
Each scorer has options of its own: xomni serve-reward ocr --help

Start one service per reward, in a terminal of its own. Several replicas of one scorer may run on other ports or machines; give the
trainer all their URLs.
"""
EXAMPLE = """\
xomni serve-reward ocr --help
xomni serve-reward ocr --port 8001
xomni serve-reward shapes --port 8002
xomni rewards ocr=http://127.0.0.1:8001 shapes=http://127.0.0.1:8002"""


class _ScorerOptions(argparse.Action):
    """Parses what follows a scorer's name: the options of every service and those of the scorer."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        name, *line = values
        try:
            scorer = scorer_class(name)
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from error
        own = Parser(
            prog=f"{parser.prog} {name}", description=inspect.getdoc(scorer), epilog=f"example:\n  {parser.prog} {name} --port 8001"
        )
        _add_service_options(own)
        add_flags(own.add_argument_group(f"options of {scorer.name}"), scorer.Options)
        own.parse_args(line, namespace)
        namespace.scorer, namespace.options = name, {f.name: getattr(namespace, f.name) for f in dataclasses.fields(scorer.Options)}


def _add_service_options(parser: Parser) -> None:
    parser.add_argument("--port", type=int, default=8001, help="where to listen; 0 takes a free port (default 8001)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in (default 127.0.0.1)")
    rare = parser.add_rare_group("https, other protocols and limits")
    rare.add_argument("--tls-cert", default="", metavar="FILE", help="certificate of https, in PEM; with --tls-key")
    rare.add_argument("--tls-key", default="", metavar="FILE", help="its private key")
    add_flags(parser, ServiceOptions, without={f.name for f in dataclasses.fields(ServiceOptions)} - {"workers"})
    add_flags(rare, ServiceOptions, without=("workers",))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every service, the scorer's name, and the scorer's own options after it."""
    _add_service_options(parser)
    parser.add_argument(
        "scorer", nargs=argparse.PARSER, action=_ScorerOptions, metavar="SCORER",
        help=f"{', '.join(SCORERS.names())}, or path/to/file.py:Class; then its own options",
    )  # fmt: skip


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Serve until stopped. ValueError (one sentence) when the port is taken, a package is missing or an option does not fit."""
    options = {f.name: getattr(args, f.name) for f in dataclasses.fields(ServiceOptions)}
    serve(ServiceConfig(args.scorer, args.options, **options), args.host, args.port, (args.tls_cert, args.tls_key))
    return 0
