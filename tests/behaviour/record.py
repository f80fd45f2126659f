"""Records what the command line computes, and checks later versions of the code against it.

    python -m tests.behaviour.record --check                  # rerun every case and compare with goldens/*.json
    python -m tests.behaviour.record --check --only chat sft  # some cases
    python -m tests.behaviour.record --root OTHER_CHECKOUT    # record the goldens from another checkout

Every case runs `xomni` commands on the shipped model, or on the shipped configurations cut down to tiny sizes, in processes whose
environment does not depend on the caller's. Where the CPU and the jax version are those of the golden, values are compared exactly;
elsewhere numbers to 1e-4 and hashes not at all. Several devices sum in an order that is not fixed: those cases are compared to 1e-6.
A key that the golden lacks is reported and does not fail; a parameter, an exported file or an image that it lacks does.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from tests.behaviour import benchmarks
from tests.behaviour.services import serving

HERE = Path(__file__).parent
GOLDENS = HERE / "goldens"
CACHE = Path(tempfile.gettempdir()) / "xomni-behaviour-xla"
SIGNS = (
    ("red", "OPEN"),
    ("green", "SALE"),
    ("blue", "WORD"),
    ("black", "TAX"),
    ("red", "GUM"),
    ("green", "YES"),
    ("blue", "ZEBRA"),
    ("black", "42"),
)
PROMPTS = [f'a {colour} sign that says "{text}"' for colour, text in SIGNS]
PROMPTS += ["two blue circles on white", "a red square on black", "three green triangles on white", "a sign"]
QUESTIONS = ("what does the sign say?", "what colour is the sign?")

# What the shipped configurations are cut down to: images of 16 x 32 pixels, 2 x 4 codes, one layer of each kind.
RUN = dict(steps=6, batch_size=4, log_every=1, save_every=6, grid_every=3)
DATA = {"data.sizes": ((16, 32),), "data.weights": (1.0,), "data.text_lengths": ((2, 3),), "data.shapes": 0.0}
ADAM = {"optimizer.warmup_steps": 1, "optimizer.learning_rate": 1e-2}


def section(name: str, **fields: Any) -> dict[str, Any]:
    """{"name.field": value}."""
    return {f"{name}.{field}": value for field, value in fields.items()}


NEXT_TOKEN = section("transformer", image_vocab_size=64, d_model=32, mlp_dim=48, n_heads=4, n_kv_heads=2, head_dim=8)
NEXT_TOKEN |= section("transformer", n_language_layers=1, n_adapter_layers=1, n_head_layers=1) | section(
    "next_token", rows=4, row_length=64
)
GRPO = {"grpo.rollouts_per_prompt": 4, "rollout.chunks": 1, "decode.steps": 2, "rewards.shapes.weight": None, "optimizer.warmup_steps": 0}
# Stage -> (the stage that it starts from, its overrides).
STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "tokenizer": (
        "",
        section("siglip_vq", width=32, layers=1, heads=2, mlp=48, pos_grid=5, codebook_size=64, code_width=8, conv_blocks=1, groups=4)
        | section("reader", d_model=32, mlp_dim=48, n_heads=2, n_kv_heads=2, head_dim=8, n_layers=1)
        | section("tokenizer", warmup_steps=1, ramp_steps=1, start_batches=2, restart_every=2, restart_until=1.0, text_length=24)
        | section("preprocess", short_size=16, long_size=48, min_short_size=8, max_aspect_ratio=4.0),
    ),
    "decoder": (
        "tokenizer",
        section("mmdit", d_model=32, n_heads=2, axes_dims=(4, 6, 6), n_double=1, n_single=1, unroll=1)
        | section("mmdit", text_dim=16, pooled_dim=16, semantic_dim=32)
        | section("t5", d_model=16, n_layers=1, n_heads=2, head_dim=8, mlp_dim=32)
        | section("clip", d_model=16, n_layers=1, n_heads=2, mlp_dim=32)
        | section("decode", steps=2, text_length=32, pooled_length=16),
    ),
    "pretrain_1": ("decoder", NEXT_TOKEN),
    "sft": ("pretrain_1", NEXT_TOKEN),
    "grpo": ("sft", GRPO),
}
# Variants of GRPO -> (simulated devices, overrides). Several devices: fewer steps, so that rounding does not grow into other codes.
VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "grpo_guidance": (1, {"sampling.guidance": 2.0}),
    "grpo_truncation": (1, {"sampling.top_k": 8}),
    "grpo_two_updates": (1, {"grpo.updates_per_batch": 2}),
    "grpo_decoder_mesh": (4, {"mesh.fsdp": 2, "decoder_mesh.fsdp": 2, "rollout.chunks": 2}),
}


class Session:
    """One version of the code, and a folder for what its commands leave; models that several cases need are made once."""

    def __init__(self, root: Path, work: Path):
        self.root, self.work = root.resolve(), work.resolve()
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "XOMNI_", "OMP_"))}
        self.environment |= dict(
            PYTHONPATH=str(self.root), JAX_PLATFORMS="cpu", OMP_NUM_THREADS="1", TF_CPP_MIN_LOG_LEVEL="2", HF_HUB_OFFLINE="1",
            JAX_COMPILATION_CACHE_DIR=str(CACHE), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.2",
        )  # fmt: skip

    @property
    def shipped(self) -> Path:
        """The tiny model of the package."""
        return self.root / "xomni_jax" / "assets" / "tiny_sft"

    def python(self, *arguments: str) -> str:
        """What a Python program of the code under test prints. RuntimeError with the end of its output when it fails."""
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=1200)
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments)[:300]}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return done.stdout

    def xomni(self, *commands: list[str], models: tuple[Path, ...] = ()) -> tuple[list[str], list[dict[str, Any]]]:
        """(what each command prints, the parameters of each model directory), all in one process."""
        task = {"commands": commands, "models": [str(model) for model in models]}
        out = json.loads(self.python(str(HERE / "worker.py"), json.dumps(task)).splitlines()[-1])
        return out["printed"], [out["models"][str(model)] for model in models]

    def train(
        self, name: str, stage: str, start: Path | None, overrides: dict[str, Any], devices: int = 1, processes: int = 1
    ) -> dict[str, Any]:
        """Runs a stage in WORK/NAME: {"metrics", "params", "config"}."""
        run = self.work / name
        settings = RUN | (DATA if start != self.shipped else {}) | ADAM | overrides | {"run_dir": run, "init_from": start or ""}
        with serving("ocr") as url:
            if stage == "grpo":
                settings |= {"rewards.ocr.urls": (url,)}
            command = ["train", f"--config={self.root / 'configs' / 'tiny' / stage}.py"]
            command += [f"--config.{key}={value}" for key, value in settings.items()]
            if processes > 1:
                together = ["--processes", str(processes), "--devices", str(devices // processes)]
                self.python("launch/local.py", *together, "--", sys.executable, "-m", "xomni_jax.cli.main", *command)
            commands = [[*command, "--devices", str(devices)]] if processes == 1 else []
            _, (params,) = self.xomni(*commands, models=(run / "model",))
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        timeless = [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in metrics]
        return {"metrics": timeless, "params": params, "config": json.loads((run / "config.json").read_text())}

    def model(self, stage: str) -> Path:
        """The model of a stage of the chain, trained when first asked for."""
        if not (self.work / stage / "model").is_dir():
            self.stage(stage)
        return self.work / stage / "model"

    def stage(self, stage: str) -> dict[str, Any]:
        """A stage of the chain."""
        before, overrides = STAGES[stage]
        return self.train(stage, stage, self.model(before) if before else None, overrides)

    def small_grpo(self) -> dict[str, Any]:
        """Two steps of GRPO on the shipped model, at its own sizes."""
        few = {"steps": 2, "save_every": 2, "batch_size": 2, "grid_every": 0, "optimizer.learning_rate": 1e-3}
        return self.train("small_grpo", "grpo", self.shipped, GRPO | few)

    def evaluated(self, name: str, suite: str, *options: str) -> Path:
        """The directory of an evaluation, made when first asked for."""
        out = self.work / name
        if not (out / "results.json").is_file():
            self.xomni(["eval", suite, "--out", str(out), *options])
        return out

    def sign_runs(self) -> dict[str, Path]:
        """Four runs of rendered-text: SFT with two seeds, SFT with guidance, RL."""
        if not (self.work / "small_grpo" / "model").is_dir():
            self.small_grpo()
        few, rl = ("--limit", "4"), str(self.work / "small_grpo" / "model")
        how = {"first": (), "second": ("--seed", "1235"), "guided": ("--guidance", "2"), "rl": ("--model", rl)}
        return {name: self.evaluated(f"signs_{name}", "rendered-text", *few, *options) for name, options in how.items()}


def pixels(folder: Path) -> dict[str, str]:
    """{path below the folder: hash of the pixels} of every image in it."""
    hashes = {}
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".png", ".webp")):
        with Image.open(path) as image:
            hashes[str(path.relative_to(folder))] = hashlib.sha256(f"{image.size}".encode() + image.convert("RGB").tobytes()).hexdigest()
    return hashes


def read_csv(path: Path) -> list[list[str]]:
    """Rows of a table."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def run_results(out: Path) -> dict[str, Any]:
    """What an evaluation leaves: results.json, the scores and replies of every item, the images, results.csv."""
    results = json.loads((out / "results.json").read_text())
    items = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    kept = ("id", "prompt", "score", "answer", "replies", "images")
    items = [{key: item[key] for key in kept if key in item} for item in items]
    return {"results": results, "items": items, "csv": read_csv(out / "results.csv"), "pixels": pixels(out / "images")}


def generate(s: Session) -> dict[str, Any]:
    """Twelve prompts with the default sampling, and with guidance and no truncation."""
    plain, guided = s.work / "generate", s.work / "generate_guided"
    options = ["--top-k", "0", "--guidance", "2", "--seed", "7"]
    s.xomni(["generate", *PROMPTS, "--out", str(plain)], ["generate", *PROMPTS, "--out", str(guided), *options])
    return {"plain": pixels(plain), "guided": pixels(guided)}


def chat(s: Session) -> dict[str, Any]:
    """Two questions about each of four images."""
    images = s.work / "chat"
    images.mkdir()
    for n in range(4):
        colours = [((40 * n + x) % 256, (90 * n + 5 * y) % 256, 30 * n) for y in range(32) for x in range(64)]
        image = Image.new("RGB", (64, 32))
        image.putdata(colours)
        image.save(images / f"{n}.png")
    printed, _ = s.xomni(*(["chat", str(images / f"{n}.png"), question, "--max-tokens", "24"] for n in range(4) for question in QUESTIONS))
    return {"answers": printed}


def export_convert(s: Session) -> dict[str, Any]:
    """The shipped model in the released layout, and back."""
    released, back = s.work / "released", s.work / "back"
    commands = [["export", "--from", str(s.shipped), "--to", str(released)], ["convert", "--xomni", str(released), "--to", str(back)]]
    commands += [["inspect", str(back), "--diff", str(s.shipped)]]
    printed, (params,) = s.xomni(*commands, models=(back,))
    files = {str(p.relative_to(released)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(released.rglob("*")) if p.is_file()}
    return {"files": files, "params": params, "inspect": printed[-1]}


def eval_all(s: Session) -> dict[str, Any]:
    """The published suites on small files, with judges that answer by the pixels."""
    benchmarks.write(s.work / "data")
    out = s.work / "all"
    with serving("judge") as judge, serving("detector") as detector:
        judges = [f"--judge={kind}=stub@{judge}/v1" for kind in ("ocr", "vqa")] + [f"--judge=detector={detector}"]
        s.xomni(["eval", "all", "--data", str(s.work / "data"), "--out", str(out), *judges])
    return {run.name: run_results(run) for run in sorted(out.iterdir())}


def eval_effect(s: Session) -> dict[str, Any]:
    """SFT against RL with three scoring services."""
    s.sign_runs()
    out = s.work / "effect"
    command = ["eval", "effect", "--sft", str(s.shipped), "--rl", str(s.work / "small_grpo" / "model"), "--out", str(out)]
    command += "--prompts 3 --samples 4 --rl-samples 2 --sweep-samples 2 --temperatures 1,0.5,0 --chunk 8".split()
    with serving("ocr") as ocr, serving("shapes") as shapes, serving("tesseract") as second:
        s.xomni([*command, "--ocr", ocr, "--shapes", shapes, "--second", second])
    return json.loads((out / "report.json").read_text())


def studies(s: Session) -> dict[str, Any]:
    """xomni eval guidance and best-of-n, and xomni compare."""
    runs = {name: str(path) for name, path in s.sign_runs().items()}
    out = {name: s.work / name for name in ("guidance", "best_of_n", "compare")}
    sft = [runs["first"], runs["second"]]
    s.xomni(
        ["eval", "guidance", runs["first"], runs["guided"], "--out", str(out["guidance"])],
        ["eval", "best-of-n", "--sft", *sft, "--rl", runs["rl"], "--out", str(out["best_of_n"])],
        ["compare", runs["first"], runs["rl"], "--out", str(out["compare"])],
    )
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name, folder in out.items()}
    return found | {f"{name}.csv": read_csv(folder / f"{name}.csv") for name, folder in out.items()}


Case = Callable[[Session], dict[str, Any]]


def variant(name: str) -> Case:
    """A variant of the last stage."""
    devices, overrides = VARIANTS[name]
    few = {"steps": 3} if devices > 1 else {}
    return lambda s: s.train(name, "grpo", s.model("sft"), GRPO | few | overrides, devices)


def rendered(suite: str) -> Case:
    """A suite of rendered signs and shapes, with the judges that run in the process."""
    return lambda s: run_results(s.evaluated(suite, suite, "--limit", "8"))


CASES: dict[str, Case] = {
    "generate": generate,
    "chat": chat,
    "export_convert": export_convert,
    "small_grpo": Session.small_grpo,
    **{stage: (lambda s, stage=stage: s.stage(stage)) for stage in STAGES},
    **{name: variant(name) for name in VARIANTS},
    "grpo_two_processes": lambda s: s.train("grpo_two_processes", "grpo", s.model("sft"), GRPO | {"steps": 3}, 4, processes=2),
    "sft_mesh": lambda s: s.train("sft_mesh", "sft", s.model("pretrain_1"), NEXT_TOKEN | {"mesh.fsdp": 4, "mesh.tensor": 2}, 8),
    **{suite: rendered(suite) for suite in ("rendered-text", "rendered-shapes", "rendered-qa")},
    "eval_all": eval_all,
    "eval_effect": eval_effect,
    "studies": studies,
}
QUICK = ("generate", "chat", "export_convert", "small_grpo")
SEVERAL_DEVICES = ("grpo_decoder_mesh", "grpo_two_processes", "sft_mesh")
# Keys whose values are times, dates, versions or sentences about the rest, in any depth; and the hash of the files of a trained model,
# which hold the time of saving.
LEFT_OUT = re.compile(r"(.*_)?seconds(_.*)?|at|date|made|created|versions?|started|wall.*|jax|jaxlib|python|rapidocr|notes|model\.sha256")


def host() -> dict[str, Any]:
    """What floats to the last bit depend on."""
    from importlib.metadata import version

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else f"model name: {platform.processor()}"
    pairs = [line.partition(":") for line in info.partition("\n\n")[0].splitlines()]
    facts = {key.strip(): value.strip() for key, _, value in pairs}
    flags = hashlib.sha256(" ".join(sorted(facts.get("flags", "").split())).encode()).hexdigest()[:8]
    return {"cpu": f"{facts.get('model name')} {facts.get('cpu family')}-{facts.get('model')}, flags {flags}", "jax": version("jax")}


def normal(value: Any, s: Session) -> Any:
    """JSON without what differs between machines and sittings; older versions say picture where newer ones say image."""
    if isinstance(value, dict):
        return {normal(key, s): normal(item, s) for key, item in value.items() if not LEFT_OUT.fullmatch(key)}
    if isinstance(value, (list, tuple)):
        return [normal(item, s) for item in value]
    if isinstance(value, str):
        value = re.sub(r"http://127\.0\.0\.1:\d+", "URL", value.replace(str(s.work), "WORK").replace(str(s.root), "ROOT"))
        return re.sub("(?i)picture", lambda found: "Image" if found[0][0] == "P" else "image", value)
    return value


def differences(golden: Any, found: Any, rtol: float, path: str = "") -> Iterator[str]:
    """What of the golden is not in what was found. `rtol` 0: to the bit, otherwise hashes are not compared."""
    if isinstance(golden, dict) and isinstance(found, dict):
        for key in golden:
            yield from differences(golden[key], found[key], rtol, f"{path}/{key}") if key in found else [f"{path}/{key} is missing"]
        if path.split("/")[-1] in ("params", "files", "pixels") or path.split("/")[-2:-1] == ["params"]:
            yield from (f"{path}/{key} is new" for key in found if key not in golden)
    elif isinstance(golden, list) and isinstance(found, list) and len(golden) == len(found):
        for n, pair in enumerate(zip(golden, found)):
            yield from differences(*pair, rtol, f"{path}/{n}")
    elif isinstance(golden, float) and isinstance(found, (int, float)) and (rtol or math.isnan(golden)):
        same = math.isclose(golden, found, rel_tol=rtol, abs_tol=rtol) or math.isnan(golden) and math.isnan(found)
        yield from [] if same else [f"{path}: {golden} became {found}"]
    elif golden != found and not (rtol and isinstance(golden, str) and re.fullmatch("[0-9a-f]{64}", golden)):
        yield f"{path}: {str(golden)[:120]} became {str(found)[:120]}"


def additions(golden: Any, found: Any, path: str = "") -> Iterator[str]:
    """Keys that the golden lacks."""
    if isinstance(golden, dict) and isinstance(found, dict):
        yield from (f"{path}/{key}" for key in found if key not in golden)
        for key in golden.keys() & found.keys():
            yield from additions(golden[key], found[key], f"{path}/{key}")


def check(name: str, s: Session) -> list[str]:
    """Reruns a case -> what differs from its golden, [] where nothing does; prints keys that are new."""
    stored = json.loads((GOLDENS / f"{name}.json").read_text())
    found = json.loads(json.dumps(normal(CASES[name](s), s)))
    rtol = 1e-6 if name in SEVERAL_DEVICES else 0.0
    if stored["host"] != host():
        print(f"{name}: recorded on {stored['host']}, here is {host()}: numbers are compared to 1e-3, hashes are not", file=sys.stderr)
        rtol = 1e-3  # rounding of 1e-7 in a small gradient: Adam's first steps make the sign of it a step of full size
    if new := sorted(additions(stored["found"], found)):
        print(f"{name}: {len(new)} keys that the golden lacks, such as {new[0]}")
    return list(differences(stored["found"], found, rtol))


@contextlib.contextmanager
def session(root: Path, work: Path | None = None) -> Iterator[Session]:
    """A session whose folder, unless it is named, is deleted at the end."""
    with contextlib.ExitStack() as stack:
        yield Session(root, work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="xomni-behaviour-"))))


def main() -> int:
    """Records or checks; exit code 1 when something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(CASES), default=tuple(CASES), metavar="NAME", help=f"of {', '.join(CASES)}")
    parser.add_argument("--check", action="store_true", help="compare with the goldens instead of writing them")
    parser.add_argument("--root", type=Path, default=HERE.parents[1], metavar="DIR", help="checkout whose code is run (default: this one)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="a new folder that keeps what the commands write")
    args = parser.parse_args()
    failed = 0
    if args.work:
        args.work.mkdir(parents=True)
    with session(args.root, args.work) as s:
        for name in args.only:
            if args.check:
                found = check(name, s)
                failed += bool(found)
                print(f"{name}: {len(found)} differences" if found else f"{name}: equal", *found[:8], sep="\n  ", flush=True)
                continue
            golden = {"host": host(), "found": normal(CASES[name](s), s)}
            (GOLDENS / f"{name}.json").write_text(json.dumps(golden, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
            print(f"{name}: recorded", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
