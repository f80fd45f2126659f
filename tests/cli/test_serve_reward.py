"""`xomni serve-reward`: help that lists the scorers, options that belong to each, errors in one sentence."""

import pytest

from xomni_jax.cli.main import main
from xomni_jax.rewards.scorer import SCORERS


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """What main changes for the process is undone."""
    monkeypatch.setattr("sys.argv", ["xomni"])
    monkeypatch.delenv("XOMNI_DEBUG", raising=False)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "unused")


def told(capsys, *line):
    """Exit code, and what is printed, of a command that ends by itself."""
    try:
        code = main(["serve-reward", *line])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    return code, out, err


def test_help_lists_every_scorer_in_one_line(capsys):
    code, out, _ = told(capsys, "--help-all")
    lines = [line.split()[0] for line in out.splitlines() if line.strip()]
    assert code == 0 and "/health" in out and all(lines.count(name) == 1 for name in SCORERS.names())


@pytest.mark.parametrize(
    "scorer, own, other",
    [
        ("ocr", "--mode", "--references"),
        ("quality", "--references", "--mode"),
        ("detector", "--short-side", "--mode"),
        ("paddle_ocr", "--mode", "--patches"),
        ("got_ocr", "--patches", "--references"),
        ("alignment", "--max-wait", "--official-code"),
        ("unified_reward", "--official-code", "--both-orders"),
        ("unified_reward_pairs", "--both-orders", "--references"),
        ("shapes", "--port", "--mode"),
    ],
)
def test_help_of_a_scorer_shows_its_options_alone(scorer, own, other, capsys):
    code, out, _ = told(capsys, scorer, "--help")
    assert code == 0 and own in out and other not in out


@pytest.mark.parametrize(
    "line, words",
    [
        ("shapes --mode crop", "unknown option --mode"),
        ("ocr --references images", "unknown option --references"),
        ("ocr --mode fast", "invalid choice: 'fast'"),
        ("detector --short-side wide", "invalid int value: 'wide'"),
        ("ocr --workers 0", "--workers 0 must be at least 1"),
        ("ocr --port 99999", "--port 99999 is no port; give a number from 1 to 65535, or 0 for a free one"),
        ("ocr --port -1", "--port -1 is no port"),
        ("ocr --host nohost.invalid", "--host nohost.invalid is no address of this machine ("),
        ("ocr --host 192.0.2.7", "--host 192.0.2.7 is no address of this machine (Cannot assign requested address); use 127.0.0.1"),
        ("taste", "the scorer 'taste' is unknown; use one of ocr, paddle_ocr, shapes"),
        ("absent.py:Taste", "absent.py: no such file; a scorer of your own"),
        ("--port 99999 ocr", "--port 99999 is no port"),
    ],
)
def test_errors_are_one_sentence(line, words, capsys):
    code, out, err = told(capsys, *line.split())
    assert code == 2 and out == "" and words in err.splitlines()[0] and err.startswith("xomni")


def test_a_class_that_is_no_scorer(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("class Mine:\n    pass\n")
    code, _, err = told(capsys, f"{tmp_path}/mine.py:Mine")
    assert code == 2 and "is not a scorer; derive the class from xomni_jax.rewards.Scorer and set its name" in err
