"""SIGKILL at random moments of every stage and of `xomni data tokenize`; each run goes on and must end as one that was left alone.

    python -m tests.behaviour.kills                      # 50 kills, about 20 minutes on two idle cores; exit code 1 if a run differs
    python -m tests.behaviour.kills --kills 3 --only sft
    python -m tests.behaviour.kills --processes 2 --kills 6 --only tokenizer tokenize

Four of five kills come at a moment that is uniform over the time in which the run works, the fifth at one that is uniform over its start.
The same command then goes on in the same folder, and is killed again. Parameters, metrics and codes are compared to the bit.
Of several processes (launch/local.py, a device each) one is killed, any of them; the launcher ends the others, and all start again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.behaviour.record import ADAM, DATA, STAGES, Session
from tests.behaviour.services import serving
from xomni_jax.core.tables import aligned

RUN = dict(steps=60, batch_size=4, log_every=1, save_every=3, grid_every=20)
KILLS_OF_A_RUN = 5  # then it may end, and the next kills are those of a new run
XOMNI = [sys.executable, "-m", "xomni_jax.cli.main"]


class Job:
    """A command that leaves a folder, and what of the folder must not depend on kills.

    Attributes:
      begun: how far the folder is; when this changes after a start, the command works and no longer starts.
      processes: that work together on it.
    """

    processes: int = 1

    def __init__(self, session: Session, name: str, command: Callable[[Path], list[str]], begun: Callable[[Path], int], result: Callable):
        self.session, self.name, self.command, self.begun, self.result = session, name, command, begun, result

    def start(self, folder: Path) -> subprocess.Popen:
        """Starts it, or goes on with it."""
        where = dict(cwd=self.session.root, env=self.session.environment, stdout=subprocess.DEVNULL, start_new_session=True)
        together = [sys.executable, "launch/local.py", "--processes", str(self.processes), "--devices", "1", "--"]
        command = [*(together if self.processes > 1 else ()), *self.command(folder)]
        return subprocess.Popen(command, stderr=(folder.parent / f"{folder.name}.err").open("w"), **where)

    def finish(self, folder: Path) -> tuple[float, float]:
        """Runs it to its end. Returns the seconds until it works, and those after."""
        before, began, process, now = self.begun(folder), time.monotonic(), self.start(folder), None
        while process.poll() is None and self.begun(folder) == before:
            time.sleep(0.01)
        working = ended = time.monotonic()
        while process.poll() is None:  # what is left when the folder is finished is the end of Python
            now, before = (self.begun(folder), (folder / "model" / "model.json").exists()), now
            ended = time.monotonic() if now != before else ended
            time.sleep(0.01)
        if process.wait(600):
            raise RuntimeError(f"{self.name}: exit code {process.returncode}\n{(folder.parent / f'{folder.name}.err').read_text()[-2000:]}")
        return working - began, ended - working

    def kill(self, folder: Path, starting: bool, wait: float, which: float) -> str:
        """Kills it so many seconds after its start or after it began to work. Returns what was on disk, "" if it ended before.

        Args:
          which: chooses one of its processes, from 0 for the first to 1.
        """
        before, process = self.begun(folder), self.start(folder)
        while not starting and process.poll() is None and self.begun(folder) == before:
            time.sleep(0.005)
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            for pid in (alive := self.members(process))[int(which * len(alive)) :][:1]:  # none, when all are just ending
                os.kill(pid, signal.SIGKILL)
        code = process.wait()
        if code not in (0, -signal.SIGKILL, 128 + signal.SIGKILL):
            raise RuntimeError(f"{self.name}: exit code {code}\n{(folder.parent / f'{folder.name}.err').read_text()[-2000:]}")
        unfinished = [p for pattern in ("*orbax-checkpoint-tmp*", ".*part*", "*.tmp*", ".codes-*") for p in folder.rglob(pattern)]
        return f"{self.begun(folder)}{', in a save' if unfinished else ''}" if code else ""

    def members(self, process: subprocess.Popen) -> list[int]:
        """The ids of its processes."""
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        return [int(pid) for pid in children.read_text().split()] if self.processes > 1 else [process.pid]


def stage(session: Session, name: str, url: str) -> Job:
    """A stage of training, on the model that the chain of stages hands it."""
    before, overrides = STAGES[name]
    start = session.model(before) if before else ""
    settings = RUN | DATA | ADAM | overrides | {"init_from": start} | ({"rewards.ocr.urls": (url,)} if name == "grpo" else {})

    def command(folder: Path) -> list[str]:
        config = f"--config={session.root / 'configs' / 'tiny' / name}.py"
        return [*XOMNI, "train", config, *(f"--config.{key}={value}" for key, value in (settings | {"run_dir": folder}).items())]

    def lines(folder: Path) -> int:
        metrics = folder / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0

    def result(folder: Path) -> Any:
        _, (params,) = session.xomni(models=(folder / "model",))
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return params, [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in metrics]

    return Job(session, name, command, lines, result)


def tokenize(session: Session) -> Job:
    """Codes of 1,200 images in 24 shards."""
    images, rng = session.work / "images", np.random.default_rng(0)
    images.mkdir()
    for n in range(1200):
        Image.fromarray(rng.integers(0, 256, (16, 32, 3), np.uint8)).save(images / f"{n:04}.png")
        (images / f"{n:04}.txt").write_text(f"noise {n}")

    def command(folder: Path) -> list[str]:
        data = {"init_from": session.shipped, "data.source": "files", "data.path": images, "data.sizes": ((16, 32),)}
        options = [f"--config.{key}={value}" for key, value in data.items()]
        config = f"--config={session.root / 'configs' / 'tiny' / 'sft'}.py"
        return [*XOMNI, "data", "tokenize", config, "--out", str(folder), "--shard", "50", "--batch", "2", *options]

    def files(folder: Path) -> int:
        return len(list(folder.iterdir())) if folder.is_dir() else 0

    return Job(session, "tokenize", command, files, lambda folder: {p.name: p.read_bytes() for p in folder.iterdir()})


def main() -> int:
    """Kills and compares. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="in all (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--processes", type=int, default=1, help="that work together on each run (default 1)")
    parser.add_argument("--only", nargs="+", default=[*STAGES, "tokenize"], help=f"some of {', '.join(STAGES)}, tokenize")
    args = parser.parse_args()
    Job.processes = args.processes
    rng, rows, same = (
        random.Random(args.seed),
        [("", "kills", "while starting", "in a save", "steps or files at each kill", "result")],
        True,
    )
    with tempfile.TemporaryDirectory(prefix="xomni-kills-") as work, serving("ocr") as url:
        session = Session(Path(__file__).parents[2], Path(work))
        for number, name in enumerate(args.only):
            job = tokenize(session) if name == "tokenize" else stage(session, name, url)
            job.finish(session.work / f"{name}-first")  # compiles, so that the next run has the times of all that follow
            starting, working = job.finish(straight := session.work / f"{name}-straight")
            wanted = args.kills // len(args.only) + (number < args.kills % len(args.only))
            places, early, runs, equal, expected = [], 0, 0, True, job.result(straight)
            while len(places) < wanted:
                folder, of_run = session.work / f"{name}-{runs}", 0
                while of_run < KILLS_OF_A_RUN and len(places) < wanted:
                    start = len(places) % 5 == 4
                    # What is left to do after earlier kills of this run is shorter.
                    wait = rng.uniform(0.3, starting) if start else rng.uniform(0, working / (of_run + 2))
                    if not (place := job.kill(folder, start, wait, rng.random())):
                        break
                    places.append(place)
                    early, of_run = early + start, of_run + 1
                job.finish(folder)
                runs, equal = runs + 1, equal and job.result(folder) == expected
                print(f"{name}: {len(places)} of {wanted} kills, run {runs} {'equal' if equal else 'DIFFERENT'}", file=sys.stderr)
            saving = sum("save" in place for place in places)
            at = " ".join(place.partition(",")[0] for place in places)
            rows.append((name, str(len(places)), str(early), str(saving), at, f"{runs} runs equal" if equal else "DIFFERENT"))
            same = same and equal
    print(aligned(rows))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
