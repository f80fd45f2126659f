"""The released 7B without its weights: directories whose files have the real headers and, as sparse files, no bytes."""

import json
import math

import numpy as np
import pytest

from tests.checkpoint import released_dirs as dirs
from xomni_jax.checkpoint.conversion_plan import make_plan
from xomni_jax.checkpoint.conversion_report import plan_lines
from xomni_jax.checkpoint.released import open_release
from xomni_jax.models import autoencoder, mmdit, siglip_vq, text_encoders, transformer

# Per layer: q and its bias, k and v and their biases, o, the SwiGLU MLP, two norms.
QWEN_LAYER = 3584 * 3584 + 3584 + 2 * (3584 * 512 + 512) + 3584 * 3584 + 3 * 3584 * 18944 + 2 * 3584
# Per block: two LayerNorms, qkv, projection, MLP, with biases.
VIT_BLOCK = 4 * 1536 + 1536 * 4608 + 4608 + 1536 * 1536 + 1536 + 2 * 1536 * 6144 + 6144 + 1536
D = 3072
# Two streams: modulation to 6 chunks, q, k, v and output, two MLP layers, with biases; two head norms each.
DOUBLE = 2 * (6 * D * D + 6 * D + 4 * (D * D + D) + 4 * D * D + 4 * D + 4 * D * D + D + 2 * 128)
SINGLE = 3 * D * D + 3 * D + 3 * (D * D + D) + 4 * D * D + 4 * D + 5 * D * D + D + 2 * 128
T5_LAYER = 4 * 4096 * 4096 + 3 * 4096 * 10240 + 2 * 4096
CLIP_LAYER = 4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768


def resnet(i, o):
    """Two norms, two 3x3 convolutions, and a 1x1 one where the width changes."""
    return 2 * i + 9 * i * o + o + 2 * o + 9 * o * o + o + (i * o + o if i != o else 0)


def conv(i, o):
    return 9 * i * o + o


MIDDLE = 2 * resnet(512, 512) + 2 * 512 + 4 * (512 * 512 + 512)
ENCODER = conv(3, 128) + 2 * resnet(128, 128) + conv(128, 128) + resnet(128, 256) + resnet(256, 256) + conv(256, 256)
ENCODER += resnet(256, 512) + resnet(512, 512) + conv(512, 512) + 2 * resnet(512, 512) + MIDDLE + 2 * 512 + conv(512, 32)
DECODER = conv(16, 512) + MIDDLE + 2 * (3 * resnet(512, 512) + conv(512, 512)) + resnet(512, 256) + 2 * resnet(256, 256) + conv(256, 256)
DECODER += resnet(256, 128) + 2 * resnet(128, 128) + 2 * 128 + conv(128, 3)

COUNTS = {
    "transformer": 36 * QWEN_LAYER + 2 * 152064 * 3584 + 2 * 16448 * 3584 + 2 * 3584,
    "siglip_vq": (40 * VIT_BLOCK + 128 * 128 * 1536 + 16 * 16 * 3 * 1536 + 1536)
    + (16384 * 2048 + 1536 * 2048 + 2048 + 2048 * 1536 + 1536 + 2 * (2 * (9 * 1536 * 1536 + 1536) + 4 * 1536)),
    "mmdit": 19 * DOUBLE + 38 * SINGLE + 2 * (256 * D + D + D * D + D) + 768 * D + D + D * D + D
    + 64 * D + D + 4096 * D + D + 1536 * D + 2 * D * D + 2 * D + D * 64 + 64,
    "autoencoder": ENCODER + DECODER,
    "t5": 24 * T5_LAYER + 32128 * 4096 + 32 * 64 + 4096,
    "clip": 12 * CLIP_LAYER + 49408 * 768 + 77 * 768 + 2 * 768,
}  # fmt: skip
# The same, as numbers: Qwen2.5-7B has 7,615,616,512 parameters; of FLUX.1, the transformer has 11,901,408,320, the VAE 83,819,683, T5
# 4,762,310,656, CLIP 123,060,480.
NUMBERS = {
    "transformer": 7_615_616_512 + 8 * QWEN_LAYER + 2 * 16448 * 3584 + 3584,
    "mmdit": 11_901_408_320 + 1536 * 3072,
    "autoencoder": 83_819_683,
    "t5": 4_762_310_656,
    "clip": 123_060_480,
}


def sparse(path, shapes, dtype="BF16", width=2):
    """A safetensors file with a real header over nothing."""
    header, end = {}, 0
    for key, shape in shapes.items():
        size = math.prod(shape) * width
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def sharded(folder, shapes, stem, count):
    keys = list(shapes)
    names = {key: f"{stem}-{i % count + 1:05d}-of-{count:05d}.safetensors" for i, key in enumerate(keys)}
    for name in set(names.values()):
        sparse(folder / name, {k: shapes[k] for k in keys if names[k] == name})
    dirs.write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {}, "weight_map": names})


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    s, x, f = dirs.RELEASED, *(tmp_path_factory.mktemp("released") / n for n in "xf")
    dirs.write_json(x / "config.json", {k: v for k, v in dirs.xomni_config(s).items() if k != "head_dim"})  # the released one has none
    sharded(x, dirs.ar(s["ar"]), "model", 4)
    sparse(x / "vit" / "siglip2_giant.pth", dirs.vit(s["vit"]), "F32", 4)
    sparse(x / "vit" / "projector.pth", dirs.projector(s["vq"], 1536), "F32", 4)
    dirs.write_json(x / "mmdit" / "config.json", {k: v for k, v in dirs.flux_config(s["mmdit"]).items() if k != "axes_dims_rope"})
    sharded(x / "mmdit", dirs.flux(s["mmdit"], 1536), "diffusion_pytorch_model", 3)
    for name, stem, shapes, config in (
        ("vae", "diffusion_pytorch_model", dirs.vae(s["vae"]), dirs.vae_config(s["vae"])),
        ("text_encoder", "model", dirs.clip(s["clip"]), dirs.clip_config(s["clip"])),
        ("text_encoder_2", "model", dirs.t5(s["t5"]), dirs.t5_config(s["t5"])),
    ):
        sparse(f / name / f"{stem}.safetensors", shapes)
        dirs.write_json(f / name / "config.json", config)
    dirs.write_json(f / "model_index.json", {"_class_name": "FluxPipeline"})
    return make_plan(open_release(x, f))


def test_every_key_is_consumed_and_every_parameter_filled(plan):
    shapes = {
        "transformer": dirs.ar(dirs.RELEASED["ar"]),
        "mmdit": dirs.flux(dirs.RELEASED["mmdit"], 1536),
        "autoencoder": dirs.vae(dirs.RELEASED["vae"]),
        "t5": dirs.t5(dirs.RELEASED["t5"]),
        "clip": dirs.clip(dirs.RELEASED["clip"]),
        "siglip_vq": dirs.vit(dirs.RELEASED["vit"]) | dirs.projector(dirs.RELEASED["vq"], 1536),
    }
    for name, targets in plan.params.items():
        taken = [rule.source.removeprefix("vit.").removeprefix("vqproj.") for t in targets for rule in t.rules]
        dropped = (
            {"norm.weight", "norm.bias", *(k for k in shapes[name] if k.startswith(("attn_pool", "head")))}
            if name == "siglip_vq"
            else set()
        )
        assert sorted(taken) == sorted(set(shapes[name]) - dropped) and not any(t.init for t in targets)
    sources = {name: sum(len(t.rules) for t in targets) for name, targets in plan.params.items()}
    by_hand = {"transformer": 36 * 12 + 6, "siglip_vq": 40 * 12 + 3 + 5 + 2 * 8, "mmdit": 19 * 32 + 38 * 14 + 21, "autoencoder": 106 + 138}
    assert sources == by_hand | {"t5": 24 * 9 + 3, "clip": 12 * 16 + 4}


def test_parameters_are_counted_as_by_hand(plan):
    counts = {name: sum(math.prod(t.shape) for t in targets) for name, targets in plan.params.items()}
    print("\n".join(line for line in plan_lines(plan) if not line.startswith(" ")), f"\ntotal: {sum(counts.values()):,}")
    assert counts == COUNTS
    assert NUMBERS.items() <= COUNTS.items()


def test_configs_are_the_presets(plan):
    """Sizes come from configs and tensors; what they are is known."""
    configs = {name: found.config for name, found in plan.release.components.items()}
    presets = {
        "transformer": transformer.PRESETS["xomni-7b"],
        "siglip_vq": siglip_vq.PRESETS["siglip2-g-xomni"],
        "mmdit": mmdit.PRESETS["flux-dev-xomni"],
        "autoencoder": autoencoder.PRESETS["flux"],
        "t5": text_encoders.T5_PRESETS["t5-v1.1-xxl"],
        "clip": text_encoders.CLIP_PRESETS["clip-l"],
    }
    how = ("dtype", "param_dtype", "remat", "query_chunk", "attention_chunk")
    for name, preset in presets.items():
        ours, theirs = ({k: v for k, v in vars(c).items() if k not in how} for c in (configs[name], preset))
        assert ours == theirs, name
    assert np.dtype(configs["siglip_vq"].param_dtype) == np.float32 and np.dtype(configs["mmdit"].param_dtype).name == "bfloat16"
