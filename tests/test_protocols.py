"""What ships fits the protocols that a user's own classes implement, as mypy sees it."""

import subprocess
import sys

from tests.miniature import ROOT


def test_the_shipped_implementations_fit():
    told = subprocess.run([sys.executable, "-m", "mypy"], capture_output=True, text=True, cwd=ROOT)
    assert told.returncode == 0, told.stdout
