#!/usr/bin/env python3
"""Runs a command as several JAX processes on this machine, as the hosts of a pod would run it: real collectives, over loopback."""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

EXAMPLE = """\
Every line of output starts with the number of its process. When a process fails, the others are ended, and its exit code is returned.
Ctrl-C and SIGTERM are passed on: training saves after a step that all processes agree on, and the same command resumes from there.
Exit codes: 0 if all ended well, or were stopped and saved ($XOMNI_STOPPED_CODE then, if it is set); 130 if interrupted; else the code of
the first process that failed.

example:
  python launch/local.py --processes 2 --devices 4 -- xomni train --config=configs/tiny/sft.py --config.run_dir=runs/two \\
      --config.init_from=xomni_jax/assets/tiny_sft --config.next_token.rows=16 --config.steps=20
"""
GRACE = 10.0  # seconds for the other processes to end by themselves, with their own message, after one has failed
SAVED = int(os.environ.get("XOMNI_STOPPED_CODE", "0"))  # exit code of a run that was stopped and has saved


def parse(argv: list[str]) -> argparse.Namespace:
    """The options, and the command that follows `--`."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="processes to start, 2 by default")
    parser.add_argument(
        "--devices", type=int, default=4, metavar="M", help="simulated CPU devices of each process, 4 by default: the mesh has N x M"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what every process runs")
    args = parser.parse_args(argv)
    args.command = args.command[1:] if args.command[:1] == ["--"] else args.command
    for name in ("processes", "devices"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} must be at least 1")
    if not args.command:
        parser.error("no command given; write it after --, such as: -- xomni train --config=configs/tiny/sft.py")
    if not shutil.which(args.command[0]):
        parser.error(f"{args.command[0]}: no such command; activate the environment it is installed in")
    return args


def free_ports() -> int:
    """A free port whose next one is free as well: the first is for JAX, the second for `core.process_group`."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


def environment(args: argparse.Namespace, index: int, port: int) -> dict[str, str]:
    """The environment of one process, which says which one it is."""
    return dict(
        os.environ, JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}", XOMNI_PROCESSES=str(args.processes), XOMNI_PROCESS=str(index),
        JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES=str(args.devices), PYTHONUNBUFFERED="1",
    )  # fmt: skip


def show(index: int, pipe) -> None:
    """Prints the lines of a process with its number in front. Each state of a progress line counts as a line."""
    for line in pipe:  # universal newlines: a carriage return ends a line as well
        if line.strip() and not line.startswith("[Gloo]"):  # Gloo reports every connection
            # One write: print writes the newline separately, and the line of another thread could come between.
            sys.stdout.write(f"[{index}] {line.rstrip()}\n")
            sys.stdout.flush()


def start(args: argparse.Namespace) -> list[subprocess.Popen]:
    """Starts all processes, each in its own session, so that Ctrl-C in the terminal reaches them only through this program."""
    port = free_ports()
    return [
        subprocess.Popen(
            args.command, env=environment(args, index, port), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            start_new_session=True,
        )
        for index in range(args.processes)
    ]  # fmt: skip


def watch(processes: list[subprocess.Popen], signals: list[int]) -> int:
    """Waits for all processes, and ends them if one fails. Returns the exit code of the first that failed, or that of all.

    Args:
      signals: those passed on so far.
    """
    code, deadline = 0, float("inf")
    while None in [process.poll() for process in processes]:
        if not code and any(process.returncode not in (None, 0, SAVED) for process in processes):
            time.sleep(0.2)  # when one is killed, others end almost at once: wait to see which one to name
            code, deadline = report_failure(processes, signals), time.monotonic() + GRACE
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    return code or report_failure(processes, signals) or max(process.returncode for process in processes)


def report_failure(processes: list[subprocess.Popen], signals: list[int]) -> int:
    """Prints which process failed and returns its exit code; 0 if none did. One that a signal ended comes before the others."""
    failed = [(process.poll(), index) for index, process in enumerate(processes) if process.poll() not in (None, 0, SAVED)]
    if not failed:
        return 0
    status, index = min(failed, key=lambda one: (one[0] > 0, one[1]))
    code = status if status > 0 else 128 - status
    how = f"failed with exit code {status}" if status > 0 else f"was ended by {signal.Signals(-status).name}"
    print(f"process {index} {'stopped' if stopped(code, signals) else how}; ending the others", file=sys.stderr, flush=True)
    return code


def stopped(code: int, signals: list[int]) -> bool:
    """Whether an exit code is that of a process that ended because it was told to."""
    return code == 128 + signal.SIGINT or code - 128 in signals or code == SAVED and bool(code or signals)


def main(argv: list[str]) -> int:
    """Starts the processes, shows their output, and waits for them."""
    args = parse(argv)
    processes, signals = start(args), []

    def pass_on(number: int, _frame) -> None:
        signals.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    readers = [threading.Thread(target=show, args=(i, p.stdout), daemon=True) for i, p in enumerate(processes)]
    for reader in readers:
        reader.start()
    code = watch(processes, signals)
    for reader in readers:
        reader.join(timeout=5)
    how = "stopped" if stopped(code, signals) else "ended well" if code == 0 else "failed"
    print(f"all {len(processes)} processes {how}" if code in (0, SAVED) else f"{how}, exit code {code}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
