"""A released model, fine-tuned and reinforced, is exported as what was downloaded but for what was trained: file by file, key by key."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from tests.checkpoint import published
from tests.checkpoint import released_dirs as dirs
from tests.encoder_tokenizers import CLIP_TOKENS, write_clip, write_t5
from tests.rl.pixel_service import pixel_service
from xomni_jax.checkpoint.convert import convert
from xomni_jax.checkpoint.export import export
from xomni_jax.core.config import Changes
from xomni_jax.training.run import run_stage
from xomni_jax.training.stage import resolve

# The smallest that one step of each stage takes: 8 pixels a token, images of 2 x 4 tokens, one layer of each kind.
SIZES = {
    "ar": dict(vocab=384, mm=576, image=512, d=16, mlp=24, heads=4, kv=2, head=4, language=1, adapters=1, tail=1),
    "vit": dict(d=96, layers=1, mlp=40, patch=8, grid=4),
    "vq": dict(codes=512, width=10, blocks=1),
    "mmdit": dict(channels=12, heads=2, head=12, axes=(2, 4, 6), double=1, single=1, text=14, pooled=18),
    "vae": dict(channels=(16, 16, 16), layers=1, latent=3, groups=8),
    "t5": dict(vocab=0, d=14, layers=1, heads=3, head=5, mlp=22, buckets=12, distance=9),
    "clip": dict(vocab=len(CLIP_TOKENS), d=18, layers=1, heads=3, mlp=26, length=77),
}
STEP = dict(steps=1, batch_size=8, grid_every=0, log_every=1, mesh=dict(data=8, fsdp=1), optimizer=dict(warmup_steps=0, learning_rate=0.01))
IMAGES = dict(sizes=((16, 32),), weights=(1.0,), text_lengths=((2, 3),), shapes=0.0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(X-Omni, FLUX.1-dev, the export of what one step of SFT and one of GRPO made of them)."""
    folder = tmp_path_factory.mktemp("round")
    sizes = SIZES | {"t5": SIZES["t5"] | dict(vocab=write_t5(folder / "t5"))}
    xomni, flux = dirs.write_xomni(folder / "xomni", sizes, np.float32, "float32"), dirs.write_flux(folder / "flux", sizes, np.float32)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.rmtree(flux / name)
    (folder / "t5").replace(flux / "tokenizer_2")
    write_clip(flux / "tokenizer")
    dirs.write_json(xomni / "generation_config.json", {"eos_token_id": 5, "pad_token_id": 3})
    # What a released config may hold beside the sizes that this package reads.
    dirs.edit_config(xomni, max_position_embeddings=4096, bos_token_id=7, rope_theta=1000000, torch_dtype="float32")
    dirs.edit_config(xomni, vision_config__transform__short_size=16, vision_config__transform__min_short_size=16)
    convert(xomni, flux, folder / "model", say=list)
    sft = dict(stage="sft", run_dir=str(folder / "sft"), init_from=str(folder / "model"), data=IMAGES, transformer=dict(preset="stored"))
    run_stage(resolve(Changes(STEP | sft | dict(next_token=dict(rows=8, row_length=64)))))
    with pixel_service() as service:
        grpo = dict(stage="grpo", run_dir=str(folder / "grpo"), init_from=str(folder / "sft" / "model"), data=IMAGES)
        rewards = dict(ocr=dict(urls=(service.url,)), shapes=dict(weight=None))
        more = dict(grpo=dict(rollouts_per_prompt=2), rollout=dict(chunks=1), rewards=rewards, decode=dict(steps=2))
        run_stage(resolve(Changes(STEP | grpo | more)))
    export(folder / "grpo" / "model", folder / "back", say=list)
    return xomni, flux, folder / "back"


def test_the_configs_are_those_that_were_downloaded(trained):
    assert published.configs(trained[2]) == published.configs(*trained[:2])
    assert "1000000," in (trained[2] / "config.json").read_text()  # a literal stays as it was written


def test_the_tensors_are_those_that_were_downloaded_but_for_the_trained(trained):
    theirs, ours = published.whole(*trained[:2]), published.whole(trained[2])
    dropped = {key for key in theirs["siglip_path"] if key.startswith(("norm.", "attn_pool", "head"))}
    assert set(ours) == set(theirs)
    for part, tensors in theirs.items():
        assert set(ours[part]) == set(tensors) - (dropped if part == "siglip_path" else set())
        for key, tensor in ours[part].items():
            assert tensor.dtype == tensors[key].dtype and tensor.shape == tensors[key].shape
            assert part == "" or tensor.tobytes() == tensors[key].tobytes(), key
    moved = [key for key, tensor in ours[""].items() if not np.array_equal(tensor, theirs[""][key])]
    assert {"mm_head.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"} <= set(moved)


def test_the_files_are_those_that_were_downloaded(trained):
    xomni, flux, back = trained
    weights = (".safetensors", ".index.json", ".safetensors.index.json")
    names = lambda folder: {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and not p.name.endswith(weights)}  # noqa: E731
    assert names(back) - {name for name in names(back) if name.startswith("flux/")} == names(xomni)
    assert {f"flux/{name}" for name in names(flux) if not name.startswith("transformer/")} <= names(back)
    assert (back / "tokenizer.json").read_bytes() == (xomni / "tokenizer.json").read_bytes()
    assert json.loads((back / "flux" / "model_index.json").read_text()) == dirs.MODEL_INDEX
    assert ml_dtypes.bfloat16 not in {tensor.dtype for tensor in published.folder(back).values()}
