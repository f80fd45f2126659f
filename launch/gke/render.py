"""Prints the Kubernetes manifest of a training run or of a service that scores or draws, for `kubectl apply -f -`.

The templates beside this file are YAML, whose values this script checks and fills in. It needs Python 3.11 and this checkout, but no
installed package.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import re
import string
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from xomni_jax.sharding.slices import Slice, parse  # noqa: E402
from xomni_jax.sharding.xla_flags import libtpu_init_args  # noqa: E402

ACCELERATORS = {  # chip -> label of its node pools
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}
EXAMPLE = """\
Training on one slice, and on two of spot machines; a service that reads text, on CPUs, and a judge on GPUs:

  python launch/gke/render.py train sft --slice v6e-16 --image IMAGE --bucket BUCKET -- \\
      xomni train --distributed --config=configs/tiny/sft.py --config.init_from=xomni_jax/assets/tiny_sft --config.next_token.rows=16 \\
      --config.mesh.data=4 --config.mesh.fsdp=4 --config.run_dir=/bucket/runs/sft | kubectl apply -f -
  python launch/gke/render.py train sft2 --slice v6e-16 --slices 2 --spot --image IMAGE --bucket BUCKET -- \\
      xomni train --distributed --config=configs/tiny/sft.py --config.init_from=xomni_jax/assets/tiny_sft --config.next_token.rows=32 \\
      --config.mesh.replica=2 --config.mesh.data=4 --config.mesh.fsdp=4 --config.run_dir=/bucket/runs/sft2 | kubectl apply -f -
  python launch/gke/render.py service ocr --image REWARD_IMAGE --replicas 4 --cpus 4 -- \\
      xomni serve-reward ocr --host 0.0.0.0 --port 8000 --workers 4 | kubectl apply -f -
  python launch/gke/render.py service judge --image vllm/vllm-openai:latest --gpu nvidia-h100-80gb --gpus 2 --secret judge -- \\
      vllm serve Qwen/Qwen2.5-VL-32B-Instruct --port 8000 --tensor-parallel-size 2 | kubectl apply -f -
  python launch/gke/render.py service draw --slice v6e-8 --image SERVE_IMAGE --secret serve --memory 64Gi -- \\
      xomni serve --host 0.0.0.0 --port 8000 --model MODEL --mesh data=8 | kubectl apply -f -

Without `| kubectl apply -f -` the manifest is only shown; it contains no secret. Secrets and settings are objects of the cluster that you
create from the environment of this shell (launch/README.md): --secret and --config-map name them, and each of their keys becomes an
environment variable of the command.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="render.py", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", metavar="train|service", required=True)
    train = kinds.add_parser("train", help="a JobSet: one command on every host of one or more TPU slices")
    train.add_argument("--slice", required=True, help="type of each slice, such as v6e-64, v5p-64, v5litepod-256, tpu7x-128")
    train.add_argument("--slices", type=int, default=1, metavar="N", help="number of slices that train together (default 1)")
    train.add_argument("--spot", action="store_true", help="use spot machines")
    train.add_argument("--bucket", required=True, help="mounted at /bucket on every host: models, runs, compiled programs")
    train.add_argument(
        "--service-account", default="xomni", metavar="NAME", help="service account that may write to the bucket (default xomni)"
    )
    train.add_argument(
        "--restarts", type=int, default=100, metavar="N", help="restarts of the run after preemptions and failures (default 100)"
    )
    service = kinds.add_parser("service", help="a Deployment and a Service: a command that answers HTTP")
    service.add_argument("--replicas", type=int, default=1, metavar="N", help="pods behind one address (default 1)")
    service.add_argument("--port", type=int, default=8000, help="port on which the command listens (default 8000)")
    service.add_argument("--cpus", type=int, default=4, metavar="N", help="CPU cores of each pod (default 4)")
    service.add_argument("--memory", default="8Gi", metavar="SIZE", help="memory of each pod (default 8Gi)")
    service.add_argument("--gpu", metavar="TYPE", help="type of GPU, such as nvidia-l4 or nvidia-h100-80gb; without it, CPUs only")
    service.add_argument("--slice", help="TPU slice of one host for each pod, such as v6e-8, for xomni serve")
    service.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs of each pod, with --gpu (default 1)")
    service.add_argument(
        "--clients",
        action="append",
        default=[],
        metavar="CIDR",
        help="network of the training hosts, such as 10.128.0.0/20; may be repeated",
    )
    for kind in (train, service):
        kind.add_argument("name", help="name of the run or service: lower-case letters, digits, dashes")
        kind.add_argument("--image", required=True, help="container image, see launch/Dockerfile")
        kind.add_argument("--secret", action="append", default=[], metavar="NAME", help="a Secret of the cluster; may be repeated")
        kind.add_argument("--config-map", action="append", default=[], metavar="NAME", help="a ConfigMap of the cluster; may be repeated")
        kind.formatter_class, kind.epilog = argparse.RawDescriptionHelpFormatter, EXAMPLE
    return parser


def slice_labels(tpu: Slice) -> dict[str, str]:
    """Labels of the node pool of a slice."""
    topology = "x".join(map(str, tpu.topology))
    return {"cloud.google.com/gke-tpu-accelerator": ACCELERATORS[tpu.chip], "cloud.google.com/gke-tpu-topology": topology}


def train_values(args: argparse.Namespace) -> dict:
    """The values of train.yaml."""
    tpu = parse(args.slice)
    if args.slices > 1 and tpu.hosts == 1:
        raise ValueError(f"--slices {args.slices}: slices of one host, such as {tpu.name}, cannot train together; take a larger --slice")
    spot = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
    return {
        "slices": args.slices,
        "hosts": tpu.hosts,
        "chips_per_host": tpu.chips_per_host,
        "node_selector": slice_labels(tpu) | ({spot["key"]: "true"} if args.spot else {}),
        "tolerations": [spot] if args.spot else [],
        "libtpu_init_args": libtpu_init_args(args.slice, args.slices),
        "bucket": args.bucket.removeprefix("gs://").rstrip("/"),
        "service_account": args.service_account,
        "restarts": args.restarts,
    }


def service_values(args: argparse.Namespace, command: list[str]) -> dict:
    """The values of service.yaml."""
    if args.slice and args.gpu:
        raise ValueError(f"--slice {args.slice} and --gpu {args.gpu}: a pod has one kind of accelerator; leave one out")
    size = {"cpu": str(args.cpus), "memory": args.memory}
    accelerators, node_selector = {}, {}
    if args.gpu:
        accelerators, node_selector = {"nvidia.com/gpu": args.gpus}, {"cloud.google.com/gke-accelerator": args.gpu}
    elif args.slice:
        tpu = parse(args.slice)
        if tpu.hosts > 1:
            raise ValueError(f"--slice {tpu.name} has {tpu.hosts} hosts, a service runs on one; take a smaller one")
        accelerators, node_selector = {"google.com/tpu": tpu.chips_per_host}, slice_labels(tpu)
    return {
        "replicas": args.replicas,
        "port": args.port,
        "node_selector": node_selector,
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}] if args.gpu else [],
        "ready": "/ready" if command[0] == "xomni" else "/health",  # others, such as vLLM, answer only when they are ready
        "clients": [{"podSelector": {}}, *({"ipBlock": {"cidr": network}} for network in args.clients)],
        "requests": size | accelerators,
        "limits": {"memory": args.memory} | accelerators,
    }


def render(argv: list[str]) -> str:
    """The manifest that a command line asks for.

    Raises:
      ValueError: the cluster would refuse a value, or it cannot work.
    """
    options, dashes, command = argv, "", []
    if "--" in argv:
        at = argv.index("--")
        options, dashes, command = argv[:at], "--", argv[at + 1 :]
    args = build_parser().parse_args(options)
    if not command:
        raise ValueError(
            f"the command is missing{' after' if dashes else '; write it after'} --, such as -- xomni train --distributed --config=FILE"
        )
    for network in getattr(args, "clients", []):
        try:
            ipaddress.ip_network(network)
        except ValueError:
            raise ValueError(f"--clients {network} is no network; write one such as 10.128.0.0/20") from None
    for name in (args.name, *args.secret, *args.config_map):
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
            raise ValueError(f"{name!r}: names are at most 40 lower-case letters, digits and dashes, and start with a letter")
    for key in ("slices", "restarts", "replicas", "cpus", "gpus"):
        if getattr(args, key, 1) < (key != "restarts"):
            raise ValueError(f"--{key} {getattr(args, key)} must be at least {int(key != 'restarts')}")
    values = train_values(args) if args.kind == "train" else service_values(args, command)
    values |= {"name": args.name, "image": args.image, "command": command}
    values["env_from"] = [{"secretRef": {"name": n}} for n in args.secret] + [{"configMapRef": {"name": n}} for n in args.config_map]
    template = string.Template((HERE / f"{args.kind}.yaml").read_text().split("\n", 2)[2])  # without the two lines about the template
    return template.substitute(
        {key: json.dumps(value, ensure_ascii=False) for key, value in values.items()}
    )  # JSON is YAML, and quotes every value


if __name__ == "__main__":
    try:
        print(render(sys.argv[1:]), end="")
    except ValueError as e:
        print(f"render.py: {e}", file=sys.stderr)
        sys.exit(2)
