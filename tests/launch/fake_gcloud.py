"""Plays gcloud, the service behind it and the hosts of a slice, for the tests of launch/queued_resource.sh.

FAKE_CLOUD names a folder: scenario.json says what happens, state.json what has happened, calls.jsonl what was asked, bucket/ is the
bucket and host-N/ the home directory of host N. A command sent by ssh runs here, once per host, and what it leaves running is killed when
the slice is taken away. Options that the real program (SDK 528) does not know are refused.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

ROOT = pathlib.Path(os.environ["FAKE_CLOUD"])
WHERE = {"--zone", "--project"}
EVERYWHERE = WHERE | {"--node", "--worker", "--batch-size", "--quiet"}
KNOWN = {
    "create": WHERE | {"--accelerator-type", "--runtime-version", "--node-id", "--node-count", "--node-prefix", "--spot", "--reserved"},
    "describe": WHERE | {"--format"},
    "delete": WHERE | {"--force", "--quiet"},
    "ssh": EVERYWHERE | {"--ssh-flag", "--command"},
    "scp": EVERYWHERE,
}


def fail(message):
    sys.exit(f"ERROR: (gcloud.compute.tpus.queued-resources) {message}")


def main(words):
    scenario, state = json.loads((ROOT / "scenario.json").read_text()), json.loads((ROOT / "state.json").read_text())
    with open(ROOT / "calls.jsonl", "a") as calls:
        calls.write(json.dumps(words) + "\n")
    try:
        if words[0] == "storage":
            return storage(words[1], words[2:])
        assert words[:3] == ["compute", "tpus", "queued-resources"], words
        return queued(words[3], words[4:], scenario, state)
    finally:
        (ROOT / "state.json").write_text(json.dumps(state))


def queued(verb, words, scenario, state):
    options = dict(w.split("=", 1) if "=" in w else (w, "") for w in words if w.startswith("--"))
    unknown = set(options) - KNOWN[verb]
    if unknown:
        sys.exit(f"ERROR: (gcloud) unrecognized arguments: {unknown}")
    failures = state.setdefault("failures", scenario.get("failures", {})).get(verb, [])
    if failures:
        message = failures.pop(0)
        if message:
            fail(message)
    exists = state.get("slice") is not None
    if verb == "create":
        if exists:
            fail("ALREADY_EXISTS: the resource exists")
        state["number"] = state.get("number", 0) + 1
        state["slice"] = list(scenario["coming"])
        for host in range(scenario["hosts"]):
            shutil.rmtree(ROOT / f"host-{host}", ignore_errors=True)
            (ROOT / f"host-{host}").mkdir()
    elif not exists:
        fail("NOT_FOUND: the resource was not found")
    elif verb == "describe":
        print(f"{next_state(scenario, state)}\t2026-11-25T20:00:0{state['number']}.5Z")
    elif verb == "delete":
        state["slice"] = None
        kill(scenario)
    elif verb == "ssh":
        for host in range(scenario["hosts"]):
            env = os.environ | {"HOME": str(ROOT / f"host-{host}"), "FAKE_HOST": f"t1v-w-{host}"}
            subprocess.run(["bash", "-c", options["--command"]], env=env, check=True, stdin=subprocess.DEVNULL)
    elif verb == "scp":
        source, target = (w for w in words if not w.startswith("--"))
        for host in range(scenario["hosts"]):
            shutil.copy(source, ROOT / f"host-{host}" / target.partition(":")[2])


def next_state(scenario, state):
    """The states on the way, then ACTIVE until the run has made as many steps as this slice lives for."""
    if state["slice"]:
        return state["slice"].pop(0)
    life = dict(enumerate(scenario.get("lives", []), 1)).get(state["number"])
    steps = ROOT / "bucket/runs/one/t1v-w-0"
    if life is None or int((steps.read_text() if steps.is_file() else "") or 0) < life:
        return "ACTIVE"
    kill(scenario)
    state["slice"] = ["SUSPENDED"] * 9
    return "SUSPENDING"


def kill(scenario):
    for host in range(scenario["hosts"]):
        group = ROOT / f"host-{host}" / "xomni/group"
        if group.is_file():
            try:
                os.killpg(int(group.read_text()), signal.SIGKILL)
            except ProcessLookupError:
                pass
            group.unlink()


def path_of(url):
    assert url.startswith("gs://pail/"), url
    return ROOT / "bucket" / url.removeprefix("gs://pail/")


def storage(verb, words):
    words = [w for w in words if w not in ("--recursive",)]
    if verb == "ls":
        path = path_of(words[0])
        if not path.exists():
            fail("One or more URLs matched no objects.")
        for entry in sorted(path.iterdir()) if path.is_dir() else [path]:
            print("gs://pail/" + str(entry.relative_to(ROOT / "bucket")) + ("/" if entry.is_dir() else ""))
    elif verb == "cat":
        path = path_of(words[-1])
        if not path.exists():
            fail("The following URLs matched no objects or files")
        sys.stdout.write(path.read_text())
    elif verb == "cp" and words[1] == "-":
        sys.stdout.buffer.write(path_of(words[0]).read_bytes())
    elif verb == "cp":
        target = path_of(words[1])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(sys.stdin.buffer.read() if words[0] == "-" else pathlib.Path(words[0]).read_bytes())
    elif verb == "rsync":
        shutil.copytree(path_of(words[0]), words[1], dirs_exist_ok=True)
    else:
        sys.exit(f"unknown storage command {verb}")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except subprocess.CalledProcessError as e:
        fail(f"the command ended with exit code {e.returncode}")
