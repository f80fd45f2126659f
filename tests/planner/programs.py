"""The programs of the released configurations on their slices, as hashes of their StableHLO text: `python -m tests.planner.programs`.

It lowers every program of `planner.gates.GATES` without compiling it (about half a minute) and prints which differ from programs.json;
with --write it records them. A program that has changed must be compiled again with `xomni plan --gates`.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from xomni_jax.planner import chips, gates
from xomni_jax.planner.plan import programs_on
from xomni_jax.training.stage import load_config

KEPT = Path(__file__).with_suffix(".json")
ROOT = Path(__file__).parents[2]
# A Pallas kernel's serialized body holds the lines of the source that made it, which say nothing of the program.
KERNEL_BODY = re.compile(r"(body\\22: \\22)[A-Za-z0-9+/=]+")


def hashes(gate: gates.Gate) -> Iterator[tuple[str, str]]:
    """(gate and program, hash) of every program of a gate."""
    topology = chips.parse(gate.topology)
    chips.prepare(topology)
    made = programs_on(load_config(ROOT / gates.FOLDER / f"{gate.config}.py", gate.overrides), topology)
    for name, program in made.programs.items():
        with jax.set_mesh(made.mesh_of(program)):
            text = program.fn.trace(*program.args).lower(lowering_platforms=("tpu",)).as_text()
        yield f"{gate.config} {gate.topology} {name}", hashlib.sha256(KERNEL_BODY.sub(r"\1", text).encode()).hexdigest()[:24]


def main(arguments: list[str]) -> int:
    """Compares all programs, or records them; the exit code is the number of programs that differ."""
    found = {name: value for gate in gates.GATES for name, value in hashes(gate)}
    if arguments == ["--write"]:
        KEPT.write_text(json.dumps({"jax": jax.__version__, "programs": found}, indent=1) + "\n")
        print(f"written: {KEPT}")
        return 0
    kept = json.loads(KEPT.read_text())["programs"]
    differ = sorted(name for name in found | kept if found.get(name) != kept.get(name))
    print(f"{len(found) - len(differ)} of {len(kept)} programs are unchanged", *differ, sep="\n  ")
    return len(differ)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
