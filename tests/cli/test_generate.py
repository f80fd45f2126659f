"""xomni generate: files with telling names, the same ones for the same seed, and nothing written when refused."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.cli.test_main import refusal, settings  # noqa: F401 - a fixture
from tests.miniature import SIZE
from xomni_jax.cli.main import main
from xomni_jax.pipeline import XOmni


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
        (["a", "caf\udce9"], "prompt 2 is not valid UTF-8 at character 4; leave that character out"),
        (["a", "--temperature", "1e-38"], "sampling temperature=1e-38 is too small to divide logits by; use 0 for greedy"),
        (["a", "sign " * 40], "tokens, this model's decoder takes 31; shorten it"),
        (["a", "--temperature", "-1"], "sampling temperature=-1.0 is not a number >= 0"),
        (["a", "--top-p", "2"], "sampling top_p=2.0 is outside (0, 1]"),
        (["a", "--seed", "-3"], "seed=-3 must lie within 0.."),
        (["a", "--edit", "a.png"], "--edit IMAGE and --mask IMAGE belong together; give both"),
        (["a", "--edit", "/no.png", "--mask", "/no.png"], "the image /no.png cannot be read: No such file or directory; give another"),
        (["a", "--edit", "a.png", "--mask", "b.png", "--height", "16"], "the size is that of its image; leave out --prompts and the size"),
        (["a", "--model", "/nowhere"], "/nowhere: no such directory; give a model directory"),
    ],
)
def test_what_is_wrong_is_told(arguments, told, model_dir, tmp_path, capsys):
    model = [] if "--model" in arguments else ["--model", str(model_dir)]
    assert told in refusal(capsys, "generate", *arguments, *model, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


FILE = "from ml_collections import ConfigDict\ndef get_config(): return ConfigDict(dict(stage='inference'))"


@pytest.fixture
def stubbed(monkeypatch):
    """The rows of every program's call; the images are black."""
    calls = []

    def sample_codes(self, prompts, grid, keys_PR, sampling, known):
        calls.append(("codes", len(prompts)))
        return {"codes": jnp.asarray(np.zeros((len(prompts), 1, *grid), np.int32))}

    def decode_images(self, codes_BYX, prompts, noise_BTC):
        calls.append(("pixels", len(prompts)))
        return jnp.asarray(np.zeros((len(prompts), *SIZE, 3), np.uint8))

    monkeypatch.setattr(XOmni, "sample_codes", sample_codes)
    monkeypatch.setattr(XOmni, "decode_images", decode_images)
    return calls


def generate(model_dir, out, prompts, *more):
    return main(["generate", *prompts, "--model", str(model_dir), "--out", str(out), *more])


def test_batches_are_those_of_the_configuration(stubbed, model_dir, tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    given = [f"--config={tmp_path / 'mine.py'}", "--config.batch=2", "--config.decode_batch=1"]
    assert generate(model_dir, tmp_path / "out", [f"sign {n}" for n in range(40)], *given) == 0
    assert [rows for what, rows in stubbed if what == "codes"] == [16, 16, 16]  # 2 and 1 on each of eight devices
    assert {rows for what, rows in stubbed if what == "pixels"} == {8}
    assert len(list((tmp_path / "out").iterdir())) == 40


def test_what_is_drawn_is_written_and_kept(stubbed, model_dir, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the third batch of 16."""
    drawn = XOmni.sample_codes

    def interrupted(self, *args, **more):
        assert len(list(tmp_path.glob("out/*.png"))) == 16 * sum(what == "codes" for what, _ in stubbed)
        if len(list(tmp_path.glob("out/*.png"))) == 32:
            raise KeyboardInterrupt
        return drawn(self, *args, **more)

    monkeypatch.setattr(XOmni, "sample_codes", interrupted)
    assert generate(model_dir, tmp_path / "out", [f"sign {n}" for n in range(40)]) == 130
    assert capsys.readouterr().err == f"interrupted: 32 of 40 images are drawn, in {tmp_path / 'out'}\n"
    assert len(list((tmp_path / "out").iterdir())) == 32


def test_nothing_is_overwritten(stubbed, model_dir, tmp_path):
    for seed in ("0", "1", "1"):
        assert generate(model_dir, tmp_path, ["a sign", "a"], "--seed", seed) == 0
    assert {p.name for p in tmp_path.iterdir()} == {f"{name}{n}.png" for name in ("000_a_sign", "001_a") for n in ("", "_2", "_3")}


@pytest.mark.parametrize("size, warned", [((16, 32), False), ((24, 32), False), ((32, 32), True), ((16, 48), True)])
@pytest.mark.parametrize("others", [[[24, 32]], None])
def test_a_size_that_the_model_never_saw(size, warned, others, stubbed, model_dir, tmp_path, recwarn):
    shutil.copytree(model_dir, tmp_path / "model")
    described = json.loads((tmp_path / "model" / "model.json").read_text())
    described["settings"]["size"].pop("others", None)
    described["settings"]["size"] |= {"others": others} if others else {}
    (tmp_path / "model" / "model.json").write_text(json.dumps(described))
    assert generate(tmp_path / "model", tmp_path / "out", ["a"], "--height", str(size[0]), "--width", str(size[1])) == 0
    told = [str(warning.message) for warning in recwarn if warning.category is UserWarning]
    said = f"{size[0]}x{size[1]}: this model was trained on 16x32, 24x32; expect a worse image"
    assert told == ([said] if warned and others else [])


def test_a_folder_that_cannot_be_written_to(stubbed, model_dir, tmp_path, monkeypatch, capsys):
    assert "/proc: nothing can be written there (" in refusal(capsys, "generate", "a", "--model", str(model_dir), "--out", "/proc/a/b")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    told = refusal(capsys, "generate", "a", "--model", str(model_dir), "--out", str(tmp_path / "out"))
    assert "0.0 MB are free, about 0.0 MB are needed; choose another disk or make room" in told
    assert not stubbed and not (tmp_path / "out").exists()


def test_a_disk_that_fills_up(stubbed, model_dir, tmp_path, monkeypatch, capsys):
    """What is complete stays; the image that found no room leaves no file."""
    written = Image.Image.save

    def save(self, file, kind):
        if "001" in file.name:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        written(self, file, kind)

    monkeypatch.setattr(Image.Image, "save", save)
    told = refusal(capsys, "generate", "a", "b", "c", "--model", str(model_dir), "--out", str(tmp_path))
    assert "001_b.png cannot be written (No space left on device); make room, or choose another --out" in told
    assert [p.name for p in tmp_path.iterdir()] == ["000_a.png"]


def test_out_must_be_a_folder(model_dir, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    told = refusal(capsys, "generate", "a", "--model", str(model_dir), "--out", str(tmp_path / "out"))
    assert "out is a file; give another folder" in told


def test_a_part_is_drawn_again(drawn, model_dir, tmp_path, monkeypatch, capsys, recwarn):
    """With one white pixel in the cell of row 1 and column 2: its code alone is drawn, and the others stay."""
    file, seen = drawn / "000_a_red_sign_that_says_AB.png", []
    monkeypatch.setattr(
        XOmni, "decode_images", lambda self, codes, prompts, noise: seen.append(codes) or np.zeros((len(codes), *SIZE, 3), np.uint8)
    )
    mask = Image.new("L", (SIZE[1], SIZE[0]))
    mask.putpixel((16, 8), 255)
    mask.save(tmp_path / "mask.png")
    edit = ["--edit", str(file), "--mask", str(tmp_path / "mask.png"), "--temperature", "3", "--top-k", "0"]
    assert generate(model_dir, tmp_path / "out", ["a", "b", "c"], *edit) == 0
    assert "it does not see what stays right of and below the cells it draws" in str(recwarn[-1].message)
    (codes,) = seen
    known = XOmni.load(model_dir).encode([Image.open(file)])[0]
    assert {tuple(cell) for image in codes[:3] for cell in np.argwhere(image != known)} == {(1, 2)}

    for changed, told in [
        (mask.resize((16, 16)), "the mask has 16x16 pixels and the image 16x32"),
        (Image.new("L", mask.size), "no white pixel"),
    ]:
        changed.save(tmp_path / "mask.png")
        assert told in refusal(capsys, "generate", "a", "--model", str(model_dir), *edit)
