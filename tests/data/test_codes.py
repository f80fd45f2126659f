"""The source of codes: the same batches and the same packed rows as from the images; what does not fit is refused in one sentence."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.data.making import config, make_codes, of_folder, opened, write_images
from tests.miniature import configs, random_params
from xomni_jax.checkpoint.store import copy_components, fingerprint, save_component
from xomni_jax.core.config import ConfigError
from xomni_jax.data.codes import CodesConfig, code_dtype, packed, unpacked
from xomni_jax.data.sources import DataSection, batches, first_batch
from xomni_jax.sequence.tokenizer import MultimodalTokenizer
from xomni_jax.sharding.mesh import make_mesh
from xomni_jax.training.components import check_codes
from xomni_jax.training.pretrain import packed_batch, sample_grid
from xomni_jax.training.stage import GRID_SEED

SHARD = "codes-00001-of-00003.array_record"


@pytest.fixture(scope="module")
def made(tmp_path_factory, model_dir):
    """(images, their codes): 28, of which one cannot be used, in three shards."""
    folder = tmp_path_factory.mktemp("codes")
    images, codes = write_images(folder / "images", 28, sizes=((32, 64), (64, 32), (48, 90))), folder / "codes"
    (images / "005.png").write_bytes(b"x")
    for n in range(0, 28, 3):  # one of several captions is drawn
        (images / f"{n:03}.txt").unlink()
        (images / f"{n:03}.json").write_text(json.dumps({"captions": ["one", "another", "a third"]}))
    make_codes(model_dir, of_folder(images), codes)
    return images, codes


def test_a_record_keeps_the_fields_that_it_has(model_dir, tmp_path):
    """As in training on the images; a stage that needs a field of every example says that some lack it."""
    write_images(tmp_path / "images", 4)
    rows = [{"file_name": f"{n:03}.png", "text": f"t{n}", "question": "which?", "answer": str(n)} for n in range(4)]
    del rows[2]["answer"], rows[2]["question"]
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    make_codes(model_dir, of_folder(tmp_path / "images"), tmp_path / "codes", shard=2)
    data = DataSection("codes", CodesConfig(str(tmp_path / "codes")))
    asked, alone = {"id", "caption", "captions", "codes", "question", "answer", "turns", "system"}, {"id", "caption", "captions", "codes"}
    records = data.epoch()
    assert [set(records[n]) for n in range(4)] == [asked, asked, alone, asked]
    with pytest.raises(ConfigError, match="its examples have no question"):
        batches(data, 0, 2, fields=("caption", "question"))
    assert next(iter(batches(data, 0, 4, fields=("question",), mixed=True, prefetch=0)))["question"].count(None)


def of_codes(path, sizes="()"):
    return "source=codes", f"path={path}", f"sizes={sizes}"


def test_the_same_packed_rows_as_from_images(made, model_dir):
    """Nine batches, more than two epochs: examples, their order, codes, drawn kinds and targets are those of training on images."""
    images, codes = made
    model = opened(str(model_dir), ("siglip_vq",), make_mesh({"data": -1}), "test")
    text = MultimodalTokenizer.load(model_dir / "tokenizer")
    rows = []
    for data in ((*of_folder(images), "skip_faulty=True"), of_codes(codes)):
        cfg = config(model_dir, *data)
        cfg = dataclasses.replace(cfg, batch_size=8, next_token=dataclasses.replace(cfg.next_token, rows=8))
        taken = itertools.islice(batches(cfg.data, 3, 8, prefetch=0), 9)
        rows.append([packed_batch(cfg, model, text, None, examples) for examples in taken])
    for (by_image, counts), (by_code, others) in zip(*rows, strict=True):
        assert counts == others and counts["data/filled"] > 0.2
        jax.tree.map(np.testing.assert_array_equal, by_image, by_code)


def test_one_size_of_several(made, model_dir):
    section = config(model_dir, *of_codes(made[1], "((32,16),)")).data
    taken = list(itertools.islice(batches(section, 0, 3, fields=("codes", "caption")), 4))
    assert all(batch["codes"].shape == (3, 4, 2) for batch in taken)
    assert section.sizes == ((32, 16),) and config(model_dir, *of_codes(made[1])).data.sizes == ((16, 32), (32, 16))


class Drawing:
    """A model that draws every code as its number."""

    set_params = noise = staticmethod(lambda *_: None)
    checked = staticmethod(np.asarray)
    sample_codes = staticmethod(lambda prompts, grid, *_: {"codes": jnp.full((len(prompts), 1, *grid), 7)})
    decode_images = staticmethod(lambda codes, prompts, noise: jnp.tile(codes[..., None], 3).astype(jnp.uint8))


def test_image_grids_show_what_the_decoder_makes_of_the_codes(made, model_dir):
    data = config(model_dir, *of_codes(made[1], "((16,32),)")).data
    state = SimpleNamespace(params=None)
    cfg = SimpleNamespace(seed=0, next_token=SimpleNamespace(understanding=0))
    grid = sample_grid(Drawing(), None, data, cfg, lambda params: params, state, 1).image()
    codes = first_batch(data, GRID_SEED, 8)["codes"]
    np.testing.assert_array_equal(grid[2:4, 2:6, 0], np.full((2, 4), 7))
    np.testing.assert_array_equal(grid[6:8, 2:6, 0], codes[0])


def test_codes_of_another_tokenizer_are_refused(made, model_dir, tmp_path):
    copy_components(model_dir, tmp_path / "other", ("transformer",))
    save_component(tmp_path / "other", "siglip_vq", random_params("siglip_vq", configs()["siglip_vq"], seed=77), configs()["siglip_vq"])
    cfg = config(model_dir, *of_codes(made[1]))
    mesh = make_mesh({"data": -1})
    model = opened(str(model_dir), ("siglip_vq",), mesh, "test")
    check_codes(cfg.data, model)
    assert not model._params  # codes do without the encoder
    held, other = cfg.data.tokenizer, opened(str(tmp_path / "other"), ("siglip_vq",), mesh, "test")
    with pytest.raises(ConfigError, match=rf"are those of tokenizer {held}, but config.init_from=.*other has tokenizer \w+; start from"):
        check_codes(cfg.data, other)


@pytest.mark.parametrize("change", ["a value", "two values exchanged", "config"])
def test_the_fingerprint_tells_tokenizers_apart(change):
    cfg = configs()["siglip_vq"]
    params = random_params("siglip_vq", cfg, 0)
    before = fingerprint("siglip_vq", params, cfg)
    spread = jax.device_put(params, jax.NamedSharding(jax.make_mesh((8,), ("x",)), jax.P()))
    spread["codebook"] = jax.device_put(params["codebook"], jax.NamedSharding(jax.make_mesh((8,), ("x",)), jax.P("x")))
    assert fingerprint("siglip_vq", spread, cfg) == before
    if change == "config":
        assert fingerprint("siglip_vq", params, dataclasses.replace(cfg, remat="full")) == before  # how it is computed
        assert fingerprint("siglip_vq", params, dataclasses.replace(cfg, temperature=3.0)) != before
        return
    book = params["codebook"]
    params["codebook"] = book.at[3, 2].add(1e-6) if change == "a value" else book.at[3].set(book[4]).at[4].set(book[3])
    assert fingerprint("siglip_vq", params, cfg) != before


@pytest.mark.parametrize("size, dtype", [(512, "<u2"), (65536, "<u2"), (65537, "<u4")])
def test_every_code_fits_its_number_format(size, dtype):
    codes = np.array([[0, size - 1, 1]])
    assert code_dtype(size) == np.dtype(dtype)
    example = {"id": "a", "caption": "é", "targets": {"text": ["A"]}, "columns": np.zeros(3)}
    back = unpacked(packed(7, example, codes, code_dtype(size)), code_dtype(size))
    assert (back.pop("codes") == codes).all() and back == {"id": "a", "caption": "é", "targets": {"text": ["A"]}}


@pytest.mark.parametrize(
    "spoil, told",
    [
        (lambda f: shutil.rmtree(f), "holds no index.json; name a folder that xomni data tokenize wrote"),
        (lambda f: (f / "index.json").unlink(), "is not finished; run the same xomni data tokenize again"),
        (lambda f: (f / "index.json").write_text("{"), "index.json is damaged; copy the folder again"),
        (lambda f: (f / SHARD).unlink(), f"{SHARD}: No such file or directory; copy the folder again"),
        (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-9]), f"{SHARD} is cut off or was replaced; copy it again"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(made, model_dir, tmp_path, spoil, told):
    folder = tmp_path / "codes"
    shutil.copytree(made[1], folder)
    spoil(folder)
    with pytest.raises(ConfigError, match=f"config.data.path={folder}.*{told}"):
        DataSection("codes", CodesConfig(str(made[1]))).updated({"path": str(folder)}, "config.data")


def test_a_folder_without_examples_is_refused(made, tmp_path):
    folder = tmp_path / "codes"
    shutil.copytree(made[1], folder)
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"sizes": [], "shards": []}))
    with pytest.raises(ConfigError, match="holds no examples: all records were rejected, as its rejected.jsonl says"):
        DataSection("codes", CodesConfig(str(made[1]))).updated({"path": str(folder), "sizes": ()}, "config.data")


def test_a_changed_byte_is_told_when_it_is_read(made, tmp_path):
    folder = tmp_path / "codes"
    shutil.copytree(made[1], folder)
    data = bytearray((folder / SHARD).read_bytes())
    data[200] ^= 1
    (folder / SHARD).write_bytes(data)
    records = DataSection("codes", CodesConfig(str(folder))).epoch()
    with pytest.raises(ConfigError, match=r"codes: record \d+ is damaged \(.*\); copy the folder again"):
        [records[n] for n in range(len(records))]


@pytest.mark.parametrize(
    "options, told",
    [
        ((), "path is empty; name a folder that xomni data tokenize wrote"),
        (("path=CODES", "sizes=((8,8),)"), r"sizes=\(\(8, 8\),\): .* holds no images of \(8, 8\)"),
    ],
)
def test_options_that_are_refused(made, model_dir, options, told):
    with pytest.raises(ConfigError, match=told):
        config(model_dir, "source=codes", *(o.replace("CODES", str(made[1])) for o in options))


@pytest.mark.parametrize("file", ["tokenizer", "decoder"])
def test_stages_that_need_the_images_say_so(made, model_dir, file):
    cfg = config(model_dir, *of_codes(made[1]), file=file)
    with pytest.raises(ConfigError, match="source=codes: its examples have no image"):
        batches(cfg.data, 0, 4, fields=("image",))
