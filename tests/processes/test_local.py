"""launch/local.py by itself: numbers, output, exit codes, signals; the commands need no JAX."""

import signal
import sys
import time

import pytest

from tests.processes.running import ended, local

PYTHON = [sys.executable, "-c"]


def test_every_process_knows_its_place():
    names = ("XOMNI_PROCESS", "XOMNI_PROCESSES", "JAX_COORDINATOR_ADDRESS", "JAX_NUM_CPU_DEVICES", "JAX_PLATFORMS")
    program = f"import os; print(*(os.environ[name] for name in {names}))"
    process = local(*PYTHON, program, processes=3, devices=5)
    told = sorted(ended(process, 60).splitlines())
    assert process.returncode == 0 and told[-1] == "all 3 processes ended well"
    places = [line.split() for line in told[:3]]
    assert [p[:3] + p[4:] for p in places] == [[f"[{i}]", str(i), "3", "5", "cpu"] for i in range(3)]
    assert len({p[3] for p in places}) == 1 and places[0][3].startswith("127.0.0.1:")


def test_the_first_failure_counts_and_ends_the_others():
    program = "import os, sys, time; index = int(os.environ['XOMNI_PROCESS']); time.sleep(0 if index else 600); sys.exit(7)"
    begun = time.monotonic()
    process = local(*PYTHON, program)
    told = ended(process, 60)
    assert process.returncode == 7 and "process 1 failed with exit code 7; ending the others" in told
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize(
    "number, answer, code, last",
    [
        (signal.SIGTERM, "sys.exit(0)", 0, "all 2 processes stopped"),
        (signal.SIGINT, "sys.exit(130)", 130, "stopped, exit code 130"),
        (signal.SIGTERM, "signal.signal(number, signal.SIG_DFL); os.kill(os.getpid(), number)", 143, "stopped, exit code 143"),
        (signal.SIGTERM, "sys.exit(3)", 3, "failed, exit code 3"),
    ],
)
def test_signals_are_passed_on(number, answer, code, last):
    """Who was told to end, and did, has not failed."""
    program = (
        "import os, signal, sys, time\n"
        f"def stop(number, frame):\n    print('stopped by', number, flush=True); {answer}\n"
        f"signal.signal({int(number)}, stop); print('ready', flush=True); time.sleep(600)"
    )
    process = local(*PYTHON, program)
    for _ in range(2):
        assert "ready" in process.stdout.readline()
    process.send_signal(number)
    told = ended(process, 60)
    assert process.returncode == code and told.splitlines()[-1] == last and all(f"[{i}] stopped by {int(number)}" in told for i in (0, 1))
    assert ("failed" in told) == (code == 3) and "was ended by" not in told


def test_one_that_has_saved_leaves_the_others_their_time():
    """The code that launchers ask for; a signal that came to the processes themselves."""
    program = (
        "import os, sys, time; index = int(os.environ['XOMNI_PROCESS']); time.sleep(0 if index else 2)\n"
        "print('saved', flush=True); sys.exit(75)"
    )
    process = local(*PYTHON, program, XOMNI_STOPPED_CODE="75")
    assert ended(process, 60).splitlines() == ["[1] saved", "[0] saved", "all 2 processes stopped"] and process.returncode == 75


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--processes", "0", "--", "true"], "--processes 0 must be at least 1"),
        ([], "no command given; write it after --"),
        (["--", "no-such-command"], "no-such-command: no such command; activate the environment"),
        (["--help"], "example:\n  python launch/local.py --processes 2 --devices 4 -- xomni train"),
    ],
)
def test_help_and_nonsense(arguments, told, capsys):
    from tests.processes.running import ROOT

    sys.path.insert(0, str(ROOT / "launch"))
    try:
        import local as launcher
    finally:
        sys.path.pop(0)
    with pytest.raises(SystemExit) as exit:
        launcher.main(arguments)
    out = capsys.readouterr()
    assert told in out.out + out.err and exit.value.code == (0 if arguments == ["--help"] else 2)
