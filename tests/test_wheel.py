"""The wheel is complete: away from the repository it draws, and finds the shipped model and configurations under their names."""

import os
import re
import subprocess
import sys
import zipfile

import pytest

from tests.miniature import ROOT

COMMANDS = """
import sys
from pathlib import Path
import xomni_jax
from xomni_jax.cli.main import main

assert Path(xomni_jax.__file__).parents[1] == Path(sys.argv[1]), xomni_jax.__file__
mine = ["--config=mine.py", "--config.run_dir=here"]
for words in (
    ["train", "--config=configs/tiny/sft.py", "--config.init_from=xomni_jax/assets/tiny_sft", "--print-config"],
    ["train", *mine, "--print-config"],
    ["plan", *mine, "--topology=cpu:2", "--program", "none"],
    ["inspect", "xomni_jax/assets/tiny_sft"],
    ["generate", "a sign", "--config=configs/xomni/generate.py"],
    ["generate", "a sign"],
):
    print(words[0], main(words), flush=True)
"""
MINE = """
from configs.tiny import demo, sft

def get_config():
    c = sft.get_config()
    c.init_from = "xomni_jax/assets/tiny_sft"
    c.optimizer.learning_rate = demo.get_config().optimizer.learning_rate
    return c
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the content of the wheel, made without leaving anything in the repository."""
    made = tmp_path_factory.mktemp("wheel")
    build = ["-q", "egg_info", "--egg-base", made, "bdist_wheel", "--bdist-dir", made / "bdist", "--dist-dir", made / "dist"]
    subprocess.run([sys.executable, "setup.py", "build", "--build-base", made / "build", *build], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = (made / "dist").glob("xomni_jax-*.whl")
    zipfile.ZipFile(wheel).extractall(made / "site")
    return made / "site"


def test_commands_in_an_empty_folder(installed, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-P", "-c", COMMANDS, str(installed)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    codes = [line for line in done.stdout.splitlines() if re.fullmatch(r"(train|plan|inspect|generate) \d", line)]
    assert codes == ["train 0", "train 0", "plan 2", "inspect 0", "generate 2", "generate 0"], done.stdout + done.stderr
    assert "--program none: stage sft has no such program" in done.stderr and "models/xomni: no such directory" in done.stderr
    assert f"* init_from = '{installed}/xomni_jax/assets/tiny_sft'" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "mine.py"]
    assert [p.name for p in (tmp_path / "images").iterdir()] == ["000_a_sign.png"]
