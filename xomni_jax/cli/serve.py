"""`xomni serve --model DIR --port P`: images and answers over HTTP in OpenAI's form, and a page that shows them."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xomni_jax.cli.inference import add_adapter, add_model, add_sampling, opened
from xomni_jax.core.http import LOOPBACK
from xomni_jax.core.options import add_flags
from xomni_jax.core.shipped import shipped
from xomni_jax.serving.options import FrontOptions, ServeOptions

if TYPE_CHECKING:
    from xomni_jax.serving.app import Site

DETAILS = """\
POST /v1/images/generations and /v1/chat/completions take what OpenAI's clients send; /openapi.json describes them, and / is a page to
draw, compare and ask with. GET /health, /ready and /metrics (Prometheus) tell the state. If XOMNI_SERVE_TOKEN is set, clients must send
it as bearer token. xomni_jax/serving/README.md has examples.

With --front the process holds no model: it sends each request to the least busy of several running services, and to another one when
that cannot answer. The same XOMNI_SERVE_TOKEN is asked of clients and sent to the services.
"""
EXAMPLE = """\
xomni serve --port 8000
xomni serve --model sft=xomni_jax/assets/tiny_sft --model rl=runs/tiny/grpo/model --reward ocr=http://127.0.0.1:8001
xomni serve --front http://host-a:8000 --front http://host-b:8000"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Models, address, sizes, limits."""
    parser.add_argument("--port", type=int, default=8000, help="where to listen; 0 takes a free port (default 8000)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in (default 127.0.0.1)")
    parser.add_argument("--sizes", default="", metavar="WxH,...", help="sizes that are served (default: those the model was trained on)")
    what = "a running reward service, which requests may choose the best of several images by; may be given several times"
    parser.add_argument("--reward", action="append", default=[], metavar="NAME=URL", help=what)
    what = "send requests to this running xomni serve, rather than hold a model; given once for each of several hosts"
    parser.add_argument("--front", action="append", default=[], metavar="URL", help=what)
    add_model(parser, "", "one device", several=True)
    rare = parser.add_rare_group("sampling, https, limits")
    add_sampling(rare)
    add_adapter(rare)
    rare.add_argument("--tls-cert", default="", metavar="FILE", help="certificate of https, in PEM; with --tls-key")
    rare.add_argument("--tls-key", default="", metavar="FILE", help="its private key")
    rare.add_argument("--quiet", action="store_true", help="print no line per request (prompts are never printed)")
    add_flags(parser, ServeOptions, without={f.name for f in dataclasses.fields(ServeOptions)} - {"slots"})
    add_flags(rare, ServeOptions, without=("slots",))


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Serves until stopped. ValueError (one sentence) when the port is taken, a model lacks a part or an option does not fit."""
    with ExitStack() as stack:
        make, options = (_front if args.front else _service)(args, rest, stack)
        serve(args, make, options)
    return 0


def serve(args: argparse.Namespace, make: Callable[[], Site], options: FrontOptions) -> None:
    """Runs what `make` returns until it is stopped."""
    from xomni_jax.core import http
    from xomni_jax.serving.app import TOKEN, create_app

    failures: list[BaseException] = []

    def make_app(url: str, stop: Any) -> Any:
        site = make()

        def failed(error: BaseException) -> None:
            failures.append(error)
            stop()

        ready = lambda: print(f"xomni serve ({', '.join(site.about_models())}) ready on {url}; stop it with Ctrl-C", flush=True)
        return create_app(site, ready, failed)

    http.serve(make_app, options, "xomni serve", args.host, args.port, (args.tls_cert, args.tls_key), TOKEN)
    if failures:
        raise failures[0]


def _options(args: argparse.Namespace, cls: type[FrontOptions]) -> Any:
    return cls(**{f.name: getattr(args, f.name) for f in dataclasses.fields(cls)})


def _front(args: argparse.Namespace, rest: list[str], stack: ExitStack) -> tuple[Callable[[], Site], FrontOptions]:
    from xomni_jax.serving.front import Front

    defaults = {f.name: f.default for f in dataclasses.fields(ServeOptions)}
    own = {"front", "host", "port", "tls_cert", "tls_key", "quiet", "command", "run", *(f.name for f in dataclasses.fields(FrontOptions))}
    if others := sorted(name for name, value in vars(args).items() if name not in own and value not in (None, "", [], defaults.get(name))):
        raise ValueError(f"--{others[0].replace('_', '-')} is for a service that holds a model; give it to those that --front names")
    options = _options(args, FrontOptions)
    return lambda: Front(args.front, options, _local(args), _log(args)), options


def _service(args: argparse.Namespace, rest: list[str], stack: ExitStack) -> tuple[Callable[[], Site], FrontOptions]:
    from xomni_jax.core.cluster import membership
    from xomni_jax.rewards.client import RewardClient
    from xomni_jax.sampling.logits import SamplingConfig
    from xomni_jax.serving.server import App
    from xomni_jax.serving.service import ServedModel, Service

    if membership():
        raise ValueError(
            "xomni serve runs a model on the devices of one process, and this is one of several; "
            "start one on each of several hosts that are no slice together, and xomni serve --front URL before them"
        )
    options = _options(args, ServeOptions)
    sizes = [_size(text) for text in args.sizes.split(",") if text]
    models, names = {}, args.model or [None]
    if args.adapter and len(names) > 1:
        raise ValueError("--adapter belongs to one model; give one --model, or serve the merged model of a run beside it")
    for given in names:
        name, path = _named(given)
        one = argparse.Namespace(**vars(args) | {"model": path})
        model, _ = opened(one, rest)
        name = name or Path(model.path).resolve().name
        if name in models:
            raise ValueError(f"two models are called {name}; name them: --model first=DIR --model second=DIR")
        models[name] = ServedModel(name, model, options, sizes)
    sampling = SamplingConfig(one.temperature, one.top_k, one.top_p, one.min_p, one.guidance)
    rewards = {}
    for service in args.reward:
        name, equals, url = service.partition("=")
        if not equals:
            raise ValueError(f"--reward {service!r} is not NAME=URL; write for example ocr=http://127.0.0.1:8001")
        rewards[name] = stack.enter_context(RewardClient(name, url.split(","), max_wait=30.0))
        rewards[name].connect()
    return lambda: App(Service(models, options), rewards, sampling, _local(args), _log(args)), options


def _local(args: argparse.Namespace) -> bool:
    return args.host in LOOPBACK


def _log(args: argparse.Namespace) -> Any:
    return None if args.quiet else sys.stderr


def _named(given: str | None) -> tuple[str, str | None]:
    """(name or "", directory) of [NAME=]DIR; a directory whose path has the sign is one."""
    if given is None or "=" not in given or Path(given).exists():
        return "", given
    name, _, path = given.partition("=")
    return name, shipped(path)


def _size(text: str) -> tuple[int, int]:
    width, x, height = text.partition("x")
    if not (x and width.isdigit() and height.isdigit()):
        raise ValueError(f"--sizes {text!r} is no size; write WIDTHxHEIGHT, such as 64x32")
    return int(height), int(width)
