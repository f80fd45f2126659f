#!/usr/bin/env python3
"""Runs a command as several JAX processes on this machine, as a pod's hosts would run it: one coordinator, real collectives over loopback."""

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
The processes' output is shown with their numbers in front. When one fails, the others are ended and its exit code is this command's. Ctrl-C and
SIGTERM are passed on: training saves at a step all processes agree on, and the same command goes on from there.
Exit codes: 0 all ended well, or stopped and saved (then $XOMNI_STOPPED_CODE where it is set); 130 interrupted; else that of the first that failed.

example:
  python launch/local.py --processes 2 --devices 4 -- xomni train --config=configs/tiny/sft.py --config.run_dir=runs/two \\
      --config.init_from=xomni_jax/assets/tiny_sft --config.next_token.rows=16 --config.steps=20
"""
GRACE = 10.0  # seconds the others have to end by themselves, with a message of their own, after one has failed
SAVED = int(os.environ.get("XOMNI_STOPPED_CODE", "0"))  # what a run that was stopped and has saved leaves with


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; what follows -- is the command."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="processes to start, 2 by default")
    parser.add_argument(
        "--devices", type=int, default=4, metavar="M", help="simulated CPU devices of each, 4 by default: the mesh has N x M"
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
    """A port that is free on this machine together with the next one, which xomni uses beside JAX's."""
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
    """What tells a process which one it is."""
    return dict(
        os.environ, JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}", XOMNI_PROCESSES=str(args.processes), XOMNI_PROCESS=str(index),
        JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES=str(args.devices), PYTHONUNBUFFERED="1",
    )  # fmt: skip


def show(index: int, pipe) -> None:
    """Prints a process's lines, and the states of a progress line, with its number in front."""
    for line in pipe:  # universal newlines: a progress line's carriage returns end lines as well
        if line.strip() and not line.startswith("[Gloo]"):  # which tells of every connection
            # One write: print would write the end of the line apart, and another reader's line could come between.
            sys.stdout.write(f"[{index}] {line.rstrip()}\n")
            sys.stdout.flush()


def start(args: argparse.Namespace) -> list[subprocess.Popen]:
    """All processes, each in a session of its own: the terminal's Ctrl-C reaches them through this one alone."""
    port = free_ports()
    return [
        subprocess.Popen(
            args.command, env=environment(args, index, port), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            start_new_session=True,
        )
        for index in range(args.processes)
    ]  # fmt: skip


def watch(processes: list[subprocess.Popen], told: list[int]) -> int:
    """Waits for all; after a failure the others are ended. Returns the exit code of the first failure, or that of all.

    `told`: the signals that were passed on by now.
    """
    code, deadline = 0, float("inf")
    while None in [process.poll() for process in processes]:
        if not code and any(process.returncode not in (None, 0, SAVED) for process in processes):
            time.sleep(0.2)  # one that was killed takes its neighbours along at once: it is the one to name
            code, deadline = tell_failure(processes, told), time.monotonic() + GRACE
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    return code or tell_failure(processes, told) or max(process.returncode for process in processes)


def tell_failure(processes: list[subprocess.Popen], told: list[int]) -> int:
    """Says which process failed, one that was ended by a signal before others -> its exit code; 0 if none did."""
    failed = [(process.poll(), index) for index, process in enumerate(processes) if process.poll() not in (None, 0, SAVED)]
    if not failed:
        return 0
    status, index = min(failed, key=lambda one: (one[0] > 0, one[1]))
    code = status if status > 0 else 128 - status
    how = f"failed with exit code {status}" if status > 0 else f"was ended by {signal.Signals(-status).name}"
    print(f"process {index} {'stopped' if stopped(code, told) else how}; ending the others", file=sys.stderr, flush=True)
    return code


def stopped(code: int, told: list[int]) -> bool:
    """Whether an exit code is that of a process which was told to end, and did."""
    return code == 128 + signal.SIGINT or code - 128 in told or code == SAVED and bool(code or told)


def main(argv: list[str]) -> int:
    """Starts, shows, waits."""
    args = parse(argv)
    processes, told = start(args), []

    def pass_on(number: int, _frame) -> None:
        told.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    readers = [threading.Thread(target=show, args=(i, p.stdout), daemon=True) for i, p in enumerate(processes)]
    for reader in readers:
        reader.start()
    code = watch(processes, told)
    for reader in readers:
        reader.join(timeout=5)
    how = "stopped" if stopped(code, told) else "ended well" if code == 0 else "failed"
    print(f"all {len(processes)} processes {how}" if code in (0, SAVED) else f"{how}, exit code {code}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
