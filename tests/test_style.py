"""What runs before every commit also runs here: the linter and the formatter (.ruff.toml), as in .pre-commit-config.yaml."""

import subprocess
import sys

import pytest

from tests.miniature import ROOT


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=lambda c: c[0])
def test_ruff(command):
    told = subprocess.run([sys.executable, "-m", "ruff", *command, "."], capture_output=True, text=True, cwd=ROOT)
    assert told.returncode == 0, told.stdout
