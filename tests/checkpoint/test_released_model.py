"""A released directory is a model: converted on the fly, on any mesh, part by part; and what was converted moves between meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xomni_jax
from tests.checkpoint import released_dirs as dirs
from xomni_jax.checkpoint.conversion import flatten
from xomni_jax.checkpoint.convert import convert
from xomni_jax.checkpoint.store import CheckpointError, save_component
from xomni_jax.sharding.mesh import make_mesh

NAMES = ("transformer", "siglip_vq", "mmdit", "autoencoder", "t5", "clip")
# Sizes that split over eight devices, still distinct.
EVEN = {
    "ar": dict(vocab=384, mm=24, image=16, d=16, mlp=24, heads=8, kv=4, head=6, language=3, adapters=1, tail=2),
    "vit": dict(d=96, layers=2, mlp=40, patch=4, grid=5),
    "vq": dict(codes=16, width=10, blocks=1),
    "mmdit": dict(channels=16, heads=4, head=12, axes=(2, 4, 6), double=2, single=3, text=16, pooled=24),
    "vae": dict(channels=(16, 24, 24), layers=1, latent=4, groups=8),
    "t5": dict(vocab=32, d=16, layers=2, heads=4, head=6, mlp=20, buckets=12, distance=9),
    "clip": dict(vocab=28, d=24, layers=2, heads=4, mlp=36, length=11),
}
MESHES = {8: {"fsdp": 4, "tensor": 2}, 4: {"fsdp": 2, "tensor": 2}, 1: {}}


def mesh_of(n):
    return make_mesh(MESHES[n], jax.devices()[:n])


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    folder = tmp_path_factory.mktemp("even")
    x, f = dirs.write_xomni(folder / "x", EVEN), dirs.write_flux(folder / "f", EVEN)
    convert(x, f, folder / "model", say=list)
    return x, f, folder / "model"


def assert_same(ours, theirs):
    a, b = flatten(ours), flatten(theirs)
    assert set(a) == set(b)
    for key in a:
        assert a[key].dtype == b[key].dtype and np.asarray(a[key]).tobytes() == np.asarray(b[key]).tobytes(), key


@pytest.mark.parametrize("name, n", [*((name, 8) for name in NAMES), ("transformer", 4), ("siglip_vq", 1), ("autoencoder", 1)])
def test_on_the_fly_and_converted_are_the_same_on_every_mesh(name, n, even):
    x, f, model = even
    direct = xomni_jax.load(x, mesh_of(n), flux=f)
    params, alone = direct.params(name), xomni_jax.load(model)
    assert_same(params, alone.params(name))
    assert direct.config(name) == alone.config(name)
    split = [v for v in flatten(params).values() if v.addressable_shards[0].data.size < v.size]
    assert all(len(v.sharding.device_set) == n for v in flatten(params).values()) and bool(split) == (n > 1)


def test_eight_devices_to_four_to_one(even, tmp_path):
    """A converted model is restored on eight devices, saved by Orbax, restored on four, saved, restored on one."""
    source = even[2]
    for n in (8, 4, 1):
        model = xomni_jax.load(source, mesh_of(n))
        params = model.params("transformer")
        save_component(tmp_path / str(n), "transformer", params, model.config("transformer"))
        source = tmp_path / str(n)
    assert_same(xomni_jax.load(source).params("transformer"), xomni_jax.load(even[2]).params("transformer"))


def test_a_dtype_is_asked_for(even):
    x, f, model = even
    for dtype in (jnp.float32, jnp.bfloat16):
        ours = xomni_jax.load(x, dtype=dtype).params("siglip_vq")
        assert {v.dtype for v in flatten(ours).values()} == {jnp.dtype(dtype)}
        assert_same(ours, xomni_jax.load(model, dtype=dtype).params("siglip_vq"))
    assert {v.dtype for v in flatten(xomni_jax.load(x).params("siglip_vq")).values()} == {jnp.dtype(jnp.float32)}


def test_it_runs(even):
    x, f, model = even
    ids = np.array([[5, 17, 390, 391, 2, 9]])
    direct, converted = xomni_jax.load(x), xomni_jax.load(model)
    for mode in ("text", "image"):
        np.testing.assert_array_equal(direct.logits(ids, mode), converted.logits(ids, mode))
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 8, 12, 3)).astype(np.float32)
    codes = direct.encode_pixels(pixels)
    np.testing.assert_array_equal(codes, converted.encode_pixels(pixels))
    np.testing.assert_array_equal(direct.semantics(codes), converted.semantics(codes))
    assert direct.decode_config == converted.decode_config or direct.decode_config.steps == 7
    assert direct.folder("tokenizer") == x and xomni_jax.load(x, flux=f).folder("tokenizer_t5") == f / "tokenizer_2"


def test_a_missing_part_is_an_error_when_it_is_used(even, tmp_path):
    import shutil

    x, f, model = even
    broken = shutil.copytree(x, tmp_path / "x")
    shutil.rmtree(broken / "mmdit")
    direct = xomni_jax.load(broken)
    assert direct.params("siglip_vq")
    with pytest.raises(CheckpointError, match="x/mmdit: no such file, but config.json names it as vision_config.decoder.model_path"):
        direct.params("mmdit")
    with pytest.raises(CheckpointError, match="this model has no t5"):
        direct.params("t5")
    with pytest.raises(CheckpointError, match="has its own VAE and text encoders; leave flux out"):
        xomni_jax.load(model, flux=f)
    assert_same(xomni_jax.load(f).params("autoencoder"), xomni_jax.load(model).params("autoencoder"))


def test_keys_that_do_not_fit_are_said_when_the_part_is_used(even, tmp_path):
    import shutil

    broken = shutil.copytree(even[0], tmp_path / "x")
    dirs.edit_config(broken, intermediate_size=25)
    with pytest.raises(
        CheckpointError, match=r"shape \(24, 16\) after .* \(and 17 more problems; xomni convert --plan lists them\)|\(16, 24\)"
    ):
        xomni_jax.load(broken).params("transformer")


@pytest.mark.parametrize("write", [dirs.write_qwen, dirs.write_siglip])
def test_plain_models_are_loaded_as_starts(write, tmp_path):
    model = xomni_jax.load(write(tmp_path / "plain"))
    name = next(iter(model.description["components"]))
    assert all(jnp.isfinite(v.astype(jnp.float32)).all() for v in flatten(model.params(name)).values())
