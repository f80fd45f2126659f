"""xomni generate: files with telling names, the same ones for the same seed, and nothing written when refused."""

import numpy as np
import pytest
from PIL import Image

from tests.cli.test_main import refusal, settings  # noqa: F401 - a fixture
from tests.miniature import SIZE
from xomni_jax.cli.main import main


@pytest.fixture(scope="module")
def drawn(model_dir, tmp_path_factory):
    """Two prompts, in the model's own size."""
    out = tmp_path_factory.mktemp("images") / "deep" / "folder"
    assert main(["generate", 'a red sign that says "AB"', "../../x", "--model", str(model_dir), "--out", str(out), "--seed", "4"]) == 0
    return out


def test_names_and_sizes(drawn):
    names = sorted(p.name for p in drawn.iterdir())
    assert names == ["000_a_red_sign_that_says_AB.png", "001_x.png"]
    assert Image.open(drawn / names[0]).size == (SIZE[1], SIZE[0])


def test_the_same_seed_draws_the_same(drawn, model_dir, tmp_path, capsys):
    main(["generate", 'a red sign that says "AB"', "y", "--model", str(model_dir), "--out", str(tmp_path), "--seed", "4"])
    name = "000_a_red_sign_that_says_AB.png"
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / name)), np.asarray(Image.open(drawn / name)))
    assert "2 images of 16x32 in " in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["a", "--height", "20", "--width", "32"], "20x32 pixels are not whole 8x8 tokens; the nearest size that is: 16x32"),
        (["a", "--height", "64", "--width", "64"], "the long side may have at most 48 pixels"),
        ([""], "prompt 1 is empty; describe the image"),
        (["a", "sign " * 40], "tokens, this model's decoder takes 31; shorten it"),
        (["a", "--temperature", "-1"], "sampling temperature=-1.0 is not a number >= 0"),
        (["a", "--top-p", "2"], "sampling top_p=2.0 is outside (0, 1]"),
        (["a", "--seed", "-3"], "seed=-3 must lie within 0.."),
        (["a", "--model", "/nowhere"], "/nowhere: no such directory; give a model directory"),
    ],
)
def test_what_is_wrong_is_told(arguments, told, model_dir, tmp_path, capsys):
    model = [] if "--model" in arguments else ["--model", str(model_dir)]
    assert told in refusal(capsys, "generate", *arguments, *model, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_out_must_be_a_folder(model_dir, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    assert "out is a file; give a folder" in refusal(capsys, "generate", "a", "--model", str(model_dir), "--out", str(tmp_path / "out"))
