"""launch/queued_resource.sh and launch/on_host.sh against a cloud that is played: two hosts, preemption, failures of every step."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = {  # what the hosts have, besides the shell
    "gcloud": f'exec {sys.executable} -ISs {Path(__file__).parent / "fake_gcloud.py"} "$@"',
    "sudo": 'exec "$@"',
    "hostname": 'echo "$FAKE_HOST"',
    "mountpoint": '[ -f "$HOME/mounted" ]',
    "gcsfuse": 'echo "$@" > "$HOME/mounted"',
    "python3.12": f"""
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin"; echo 'PATH='"$3"'/bin:$PATH' > "$3/bin/activate"; cp "$0" "$3/bin/python" ;;
  "-m pip") echo "$@" >> "$HOME/pip" ;;
  -c*) ;;
  *) exec {sys.executable} "$@" ;;
esac""",
}
# Counts to $1 in the run directory, a step at a time, and goes on from where it was.
TRAIN = """\
run=$XOMNI_BUCKET/runs/one
mkdir -p $run
step=$(cat $run/$FAKE_HOST 2> /dev/null || echo 0)
[ $step = 0 ] || echo "resuming after step $step"
[ $FAKE_HOST != t1v-w-1 ] || [ ! -s $run/fail ] || { echo "out of memory" >&2; code=$(head -1 $run/fail); sed -i 1d $run/fail; exit $code; }
env | grep -E 'LIBTPU|JAX_|KEY|STOPPED' | sort > $run/$FAKE_HOST.env
while [ $step -lt $1 ]; do step=$((step + 1)); echo $step > $run/$FAKE_HOST; echo "step $step"; sleep 0.05; done
"""


class Cloud:
    """The played cloud and the checkout that is shipped."""

    def __init__(self, folder):
        self.folder, self.repo = folder / "cloud", folder / "repo"
        (self.folder / "bucket").mkdir(parents=True)
        (self.folder / "state.json").write_text("{}")
        self.plan(coming=["WAITING_FOR_RESOURCES", "PROVISIONING"])
        bin = folder / "bin"
        bin.mkdir()
        for name, body in TOOLS.items():
            (bin / name).write_text("#!/bin/bash\n" + body + "\n")
            (bin / name).chmod(0o755)
        (self.repo / "xomni_jax/sharding").mkdir(parents=True)
        shutil.copytree(ROOT / "launch", self.repo / "launch")
        for file in ("setup.py", "xomni_jax/__init__.py", "xomni_jax/sharding/__init__.py", "xomni_jax/sharding/xla_flags.py"):
            shutil.copy(ROOT / file, self.repo / file)
        (self.repo / "train.sh").write_text(TRAIN)
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("XOMNI", "JAX", "LIBTPU", "GIT_"))}
        self.env |= {"PATH": f"{bin}:{os.environ['PATH']}", "FAKE_CLOUD": str(self.folder), "XOMNI_BUCKET": str(self.folder / "bucket")}
        self.env["HOME"] = str(folder)
        self.git("init", "-q")
        self.git("add", ".")
        self.git("-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "-m", "first")
        self.commit = self.git("rev-parse", "--short=12", "HEAD").strip()

    def git(self, *words):
        return subprocess.run(["git", *words], cwd=self.repo, env=self.env, check=True, capture_output=True, text=True).stdout

    def plan(self, **scenario):
        (self.folder / "scenario.json").write_text(json.dumps({"hosts": 2, "coming": []} | scenario))

    def __call__(self, *words, verb="run", **env):
        line = ["bash", "launch/queued_resource.sh", verb, "one", "--zone", "us-east5-b", "--bucket", "pail", "--poll", "0", *words]
        return subprocess.run(line, cwd=self.repo, env=self.env | env, capture_output=True, text=True, timeout=600)

    def run(self, *words, steps=5, **env):
        return self("--accelerator", "v6e-16", *words, "--", "bash", "train.sh", str(steps), **env)

    def calls(self, *verb):
        lines = [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]
        return [line for line in lines if line[: len(verb)] == list(verb) or line[3 : 3 + len(verb)] == list(verb)]

    def read(self, path):
        return (self.folder / "bucket" / path).read_text()


@pytest.fixture
def cloud(tmp_path):
    played = Cloud(tmp_path)
    yield played
    # Ends what a failed test has left on its hosts.
    subprocess.run(
        [sys.executable, Path(__file__).parent / "fake_gcloud.py", *"compute tpus queued-resources delete one".split()],
        env=played.env,
        capture_output=True,
    )


def test_from_nothing_to_a_finished_run(cloud):
    done = cloud.run("--spot", "--secret", "API_KEY", "--project", "p", API_KEY="hush 'quoted' $x")
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout
    order = [
        "asking for 1 x v6e-16 (spot)",
        "is WAITING_FOR_RESOURCES",
        "is PROVISIONING",
        "is ACTIVE",
        "installing commit",
        "starting on every host",
        "giving one back",
    ]
    assert sorted(order, key=said.index) == order
    assert said.splitlines()[-1].startswith("finished: logs in gs://pail/launch/one/20261125200001")
    create = cloud.calls("create")
    where = ["--zone=us-east5-b", "--project=p"]
    assert [c[4:] for c in create] == [
        ["one", *where, "--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e", "--node-id=one", "--spot"]
    ]
    assert len(cloud.calls("ssh")) == 2 and len(cloud.calls("delete")) == 1
    assert (cloud.folder / "bucket/code" / f"{cloud.commit}.tar.gz").is_file()
    for host in ("t1v-w-0", "t1v-w-1"):
        assert cloud.read(f"runs/one/{host}") == "5\n"
        env = cloud.read(f"runs/one/{host}.env")
        assert "LIBTPU_INIT_ARGS=--xla_tpu" in env and "scoped_vmem_limit_kib=98304" in env and "STOPPED_CODE=75" in env
        assert f"JAX_COMPILATION_CACHE_DIR={cloud.folder}/bucket/xla" in env
        assert "API_KEY=hush 'quoted' $x\n" in env
    log = next((cloud.folder / "bucket/launch/one").rglob("t1v-w-0.log")).read_text()
    assert "step 5" in log and "exit code 0" in log
    # The secret is in no call, log, archive, nor in a file that is left on a host.
    files = [p for p in cloud.folder.rglob("*") if p.is_file() and p.suffix != ".env"]
    assert len(files) > 10 and not [p for p in files if b"hush" in p.read_bytes()]
    assert "hush" not in said + done.stderr


def test_preempted_run_is_asked_for_again_and_resumes(cloud):
    late = ["", "RESOURCE_EXHAUSTED: Quota limit", "RESOURCE_EXHAUSTED: Quota limit"]  # the old slice's quota returns late
    cloud.plan(coming=["WAITING_FOR_RESOURCES"], lives=[20], failures={"create": late})
    done = cloud.run("--spot", "--retries", "0", steps=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the slice was taken away (SUSPENDING)" in done.stdout and "refused (try 2 of 5): ERROR" in done.stdout
    verbs = [c[3] for c in cloud.calls() if c[0] == "compute" and c[3] in ("create", "delete", "ssh")]
    assert verbs == ["create", "ssh", "ssh", "delete", "create", "create", "create", "ssh", "ssh", "delete"]
    first, second = sorted((cloud.folder / "bucket/launch/one").iterdir())
    assert (first.name, second.name) == ("202611252000015-01", "202611252000025-01")
    assert not list(first.glob("*.exit-*"))
    resumed = (second / "t1v-w-0.log").read_text()
    assert "resuming after step" in resumed and "step 60" in resumed


def test_attach_status_logs_delete(cloud):
    nothing = cloud(verb="logs")
    assert nothing.returncode == 2 and "no logs under gs://pail/launch/one" in nothing.stderr
    assert "one is ABSENT; newest start none: 0 hosts started" in cloud(verb="status").stdout
    done = cloud.run("--keep")
    assert done.returncode == 0 and "giving one back" not in done.stdout
    assert "one is ACTIVE; newest start 202611252000015-01: 2 hosts started, 2 ended with exit code 0" in cloud(verb="status").stdout
    logs = cloud(verb="logs")
    assert logs.stdout.splitlines()[-1] == "logs: logs/one" and "step 5" in logs.stdout
    assert len(list((cloud.repo / "logs/one").rglob("*.log"))) == 2
    again = cloud.run("--keep")
    assert again.returncode == 0 and "attached to start" in again.stdout and "finished" in again.stdout
    assert len(cloud.calls("create")) == 1 and len(cloud.calls("ssh")) == 2
    # What runs is not disturbed: the same with a command that has not ended.
    for done in (cloud.folder / "bucket/launch/one").rglob("*.exit-0"):
        done.unlink()
    other = cloud.run("--keep", steps=6)
    assert other.returncode == 2 and f"busy with another command (commit {cloud.commit} bash train.sh 5)" in other.stderr
    assert cloud(verb="delete").stdout.splitlines()[-1] == "deleted: one"


def test_failure_on_a_healthy_slice_is_retried_and_a_wrong_command_is_not(cloud):
    (cloud.folder / "bucket/runs/one").mkdir(parents=True)
    fail = cloud.folder / "bucket/runs/one/fail"
    fail.write_text("1\n75\n")
    done = cloud.run("--keep", "--retries", "1")
    assert (
        done.returncode == 0
        and "failed (exit code 1) on a healthy slice; starting it again, 0 more" in done.stdout
        and "out of memory" in done.stdout
    )
    assert done.stdout.index("starting it again, 0 more") < done.stdout.index("was stopped and has saved; starting it again")
    fail.write_text("9\n")
    done = cloud.run("--retries", "0", steps=7)
    assert (
        done.returncode == 1
        and "the command failed (exit code 9" in done.stderr
        and "costs money until: bash launch/queued_resource.sh delete one" in done.stderr
    )
    fail.write_text("2\n")
    done = cloud.run(steps=8)
    assert done.returncode == 2 and "the command cannot run like this" in done.stderr
    assert "delete" not in [c[3] for c in cloud.calls("compute")]
    assert sorted(p.name[-2:] for p in (cloud.folder / "bucket/launch/one").iterdir()) == [f"0{i}" for i in range(1, 6)]


def test_multislice_and_reserved(cloud):
    assert cloud.run("--slices", "2", "--reserved").returncode == 0
    assert cloud.calls("create")[0][-4:] == ["--runtime-version=v2-alpha-tpuv6e", "--node-count=2", "--node-prefix=one", "--reserved"]
    assert {"--node=all", "--worker=all", "--batch-size=all"} < set(cloud.calls("ssh")[0])
    assert "megascale_abort_on_hangs" in cloud.read("runs/one/t1v-w-1.env")


def test_quota_and_refusals(cloud):
    cloud.plan(
        failures={"create": ["RESOURCE_EXHAUSTED: Quota limit 'TPUV6EPreemptiblePerProjectPerZone' has been exceeded. Limit: 16"] * 9}
    )
    done = cloud.run("--spot")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "no quota for v6e-16 with --spot in us-east5-b" in done.stderr and "Limit: 16" in done.stderr
    cloud.plan(failures={"create": ["PERMISSION_DENIED: no access to tpu.googleapis.com"]})
    (cloud.folder / "state.json").write_text("{}")
    done = cloud.run()
    assert done.returncode == 2 and "the request was refused" in done.stderr and "PERMISSION_DENIED" in done.stderr


def test_ssh_that_fails_is_tried_again(cloud):
    cloud.plan(failures={"ssh": ["[/usr/bin/ssh] exited with return code [255].", "Connection refused", "", "Connection closed"]})
    done = cloud.run()
    assert done.returncode == 0 and done.stdout.count("ssh failed (try") == 3
    (cloud.folder / "state.json").write_text("{}")
    cloud.plan(failures={"ssh": ["Permission denied (publickey)."] * 5})
    done = cloud.run(steps=6)
    assert done.returncode == 2 and "could not be prepared" in done.stderr and "publickey" in done.stderr and "delete one" in done.stderr


def test_request_that_fails_or_is_deleted(cloud):
    cloud.plan(coming=["WAITING_FOR_RESOURCES", "FAILED"])
    done = cloud.run()
    assert (
        done.returncode == 2 and "the request for one failed; the reason: gcloud compute tpus queued-resources describe one" in done.stderr
    )
    # What is left of it is cleared away by the next try.
    state = json.loads((cloud.folder / "state.json").read_text())
    (cloud.folder / "state.json").write_text(json.dumps(state | {"slice": ["FAILED"]}))
    cloud.plan(coming=[])
    assert cloud.run().returncode == 0
    assert [c[3] for c in cloud.calls() if c[0] == "compute" and c[3] != "describe"] == [
        "create",
        "delete",
        "create",
        "ssh",
        "ssh",
        "delete",
    ]


def test_state_that_cannot_be_read(cloud):
    cloud.plan(failures={"describe": ["Could not resolve host"] * 5})
    done = cloud.run()
    assert done.returncode == 2 and "the state of one cannot be read" in done.stderr and "Could not resolve host" in done.stderr


def test_dry_run_prints_every_command_and_calls_nothing(cloud):
    done = cloud.run("--slices", "2", "--spot", "--secret", "API_KEY", "--dry-run", API_KEY="hush")
    assert done.returncode == 0 and not (cloud.folder / "calls.jsonl").exists()
    commands = [line for line in done.stdout.splitlines() if line.startswith("gcloud")]
    assert [line.split()[1 if "storage" in line.split()[1] else 4] for line in commands] == [
        "create",
        "describe",
        "storage",
        "ssh",
        "scp",
        "ssh",
        "delete",
    ]
    assert "hush" not in done.stdout and "train.sh" in commands[-2]


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("--accelerator", "v6e-16"), "the command to run is missing"),
        (("--accelerator", "tpu7x-128", "--", "x"), "through GKE only"),
        (("--accelerator", "a100-8", "--", "x"), "must be v4-N, v5litepod-N, v5p-N or v6e-N"),
        (("--accelerator", "v6e-16", "--spot", "--reserved", "--", "x"), "exclude each other"),
        (("--accelerator", "v6e-16", "--slices", "two", "--", "x"), "two is no number"),
        (("--accelerator", "v6e-16", "--secret", "UNSET_ONE", "--", "x"), "this shell has no such variable"),
        (("--accelerator", "v6e-16", "--secret", "KEY=value", "--", "x"), "the name of an environment variable, not its value"),
        (("--accelerator", "v6e-16", "--fast", "--", "x"), "unknown option --fast"),
        (("--accelerator",), "--accelerator needs a value"),
        (("two", "--accelerator", "v6e-16", "--", "x"), "two names, one and two"),
        (("--accelerator", "v6e-16", "--", "xomni", "train", "--config=c"), "add --distributed"),
    ],
)
def test_bad_input_is_one_sentence(cloud, words, sentence):
    done = cloud(*words)
    assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1
    assert not (cloud.folder / "calls.jsonl").exists()


def test_uncommitted_changes_are_not_shipped(cloud):
    (cloud.repo / "train.sh").write_text("exit 1")
    done = cloud.run()
    assert done.returncode == 2 and "not committed" in done.stderr
