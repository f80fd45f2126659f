"""How many files a reader meets between a benchmark's data file and a cell of the paper's table."""

import inspect
import sys
from pathlib import Path

from PIL import Image

import xomni_jax
from tests.evaluation.test_judging import Grey
from tests.evaluation.test_others import longtext  # noqa: F401 - a fixture
from xomni_jax.evaluation.paper import find_runs, table_text
from xomni_jax.evaluation.run import EvalConfig, evaluate

PACKAGE = Path(xomni_jax.__file__).parent
MOST = 25


def files_that_run(action):
    """Files of the package in which a function runs while `action()` does; the bodies of modules and classes are no functions."""
    found = set()

    def called(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_flags & inspect.CO_OPTIMIZED and code.co_filename.startswith(str(PACKAGE)):
            found.add(str(Path(code.co_filename).relative_to(PACKAGE)))

    sys.setprofile(called)
    try:
        action()
    finally:
        sys.setprofile(None)
    return found


def test_from_the_data_file_to_the_cell(longtext, tmp_path):  # noqa: F811
    folder = tmp_path / "theirs"
    folder.mkdir()
    for name in ("0000", "0007"):
        Image.new("RGB", (8, 8)).save(folder / f"{name}_0.png")
    config = EvalConfig("longtext-en", tmp_path / "runs" / "ours", longtext, images=str(folder), repeats=1, report=False)
    said = []

    def walk():
        evaluate(config, judge=Grey())
        said.append(table_text(find_runs(tmp_path / "runs")))

    found = files_that_run(walk)
    assert "ours, not comparable: LongText EN 0.000 from 2 of 160 items" in said[0]
    assert "evaluation/suites/longtext.py" in found and len(found) <= MOST, "\n".join(sorted(found))
