"""`config.json` of published directories, read into our config dataclasses and written again.

Settings that our modules do not compute (another activation, scaled rotary positions, ...) are refused, naming file, key and value.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from xomni_jax.checkpoint.conversion import ConversionError
from xomni_jax.checkpoint.tensor_file import read_json
from xomni_jax.data.preprocess import ImageLimits
from xomni_jax.models.autoencoder import AutoencoderConfig
from xomni_jax.models.mmdit import MMDiTConfig
from xomni_jax.models.text_encoders import CLIPTextConfig, T5Config
from xomni_jax.models.transformer import ARConfig
from xomni_jax.sampling.decoder import DecodeConfig

REQUIRED = object()
SAME = "take the config of the same checkpoint as the weights"
IDENTITY = "IdentityAutoencoder"
IDENTITY_FIELDS = ("identity_factor", "pixel_channels", "latent_channels", "scaling_factor", "shift_factor")
CHUNK = 512  # queries per attention step of a converted transformer: bounds memory, changes no value


class ConfigFile:
    """A JSON object of settings; errors name the file and the key."""

    def __init__(self, path: Path, data: Mapping[str, Any] | None = None, section: str = ""):
        self.path, self.section = Path(path), section
        self.data = read_json(self.path) if data is None else dict(data)

    def get(self, key: str, default: Any = REQUIRED) -> Any:
        """The value, or `default` where the key is missing or null."""
        value = self.data.get(key)
        if value is None and default is REQUIRED:
            raise ConversionError(f"{self.path}: {self.section}{key} is missing; {SAME}")
        return default if value is None else value

    def _checked(self, key: str, default: Any, is_valid: Callable[[Any], bool], what: str) -> Any:
        value = self.get(key, default)
        if not is_valid(value):
            raise ConversionError(f"{self.path}: {self.section}{key}={value!r} is no {what}; {SAME}")
        return value

    def size(self, key: str, default: Any = REQUIRED) -> int:
        """A whole number of at least 0."""
        return self._checked(key, default, lambda value: type(value) is int and value >= 0, "size")

    def sizes_by(self, keys: Mapping[str, str], **defaults: int) -> dict[str, int]:
        """{field: size} of the keys that a table gives to fields."""
        return {field: self.size(key, defaults.get(key, REQUIRED)) for field, key in keys.items()}

    def number(self, key: str, default: Any = REQUIRED) -> float:
        """A number."""
        return self._checked(key, default, lambda value: type(value) in (int, float), "number")

    def sizes(self, key: str, default: Any = REQUIRED) -> tuple[int, ...]:
        """A list of whole numbers."""
        is_valid = lambda value: isinstance(value, (list, tuple)) and all(type(n) is int for n in value)  # noqa: E731
        return tuple(self._checked(key, default, is_valid, "list of sizes"))

    def pairs(self, key: str) -> list[list[int]]:
        """A list of pairs of whole numbers."""
        is_pair = lambda pair: isinstance(pair, list) and len(pair) == 2 and all(type(n) is int for n in pair)  # noqa: E731
        return self._checked(key, REQUIRED, lambda value: isinstance(value, list) and all(map(is_pair, value)), "list of pairs")

    def expect(self, key: str, *allowed: Any, default: Any = REQUIRED) -> None:
        """Refuses a value that this package does not compute."""
        value = self.get(key, default)
        if value not in allowed:
            raise ConversionError(f"{self.path}: {self.section}{key}={value!r} is not supported, only {' or '.join(map(repr, allowed))}")

    def part(self, key: str, default: Any = REQUIRED) -> ConfigFile:
        """A nested object."""
        value = self.get(key, default)
        if not isinstance(value, dict):
            raise ConversionError(f"{self.path}: {self.section}{key} is no object; {SAME}")
        return ConfigFile(self.path, value, f"{self.section}{key}.")

    def path_within(self, key: str, default: Any = REQUIRED) -> Path:
        """A path that must lie within the directory of the config."""
        name = self.get(key, default)
        if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ConversionError(f"{self.path}: {self.section}{key}={name!r} is no path within the directory")
        return Path(name)

    def build(self, cls: type, **fields: Any) -> Any:
        """A config dataclass; its errors name this file."""
        try:
            return cls(**fields)
        except ValueError as e:
            raise ConversionError(f"{self.path}: {e}") from None


# ---- sizes: {field of ours: key of the config}, which serves both directions ----
TRANSFORMER = dict(
    vocab_size="vocab_size", mm_vocab_size="mm_vocab_size", image_vocab_size="image_vocab_size", d_model="hidden_size",
    mlp_dim="intermediate_size", n_heads="num_attention_heads", n_kv_heads="num_key_value_heads", head_dim="head_dim",
    n_adapter_layers="num_mm_adap_layers", n_head_layers="num_mm_head_layers",
)  # fmt: skip
MMDIT = dict(
    in_channels="in_channels", n_heads="num_attention_heads", n_double="num_layers", n_single="num_single_layers",
    text_dim="joint_attention_dim", pooled_dim="pooled_projection_dim",
)  # fmt: skip
VAE = dict(pixel_channels="in_channels", latent_channels="latent_channels", layers_per_block="layers_per_block", groups="norm_num_groups")
T5 = dict(
    vocab_size="vocab_size", d_model="d_model", n_layers="num_layers", n_heads="num_heads", head_dim="d_kv", mlp_dim="d_ff",
    n_buckets="relative_attention_num_buckets", max_distance="relative_attention_max_distance",
)  # fmt: skip
CLIP = dict(
    vocab_size="vocab_size", d_model="hidden_size", n_layers="num_hidden_layers", n_heads="num_attention_heads",
    mlp_dim="intermediate_size", max_length="max_position_embeddings",
)  # fmt: skip


def written(cfg: Any, keys: Mapping[str, str]) -> dict[str, Any]:
    """The sizes of a config of ours under the keys of a published one."""
    return {key: getattr(cfg, field) for field, key in keys.items()}


def read_transformer(c: ConfigFile) -> ARConfig:
    """Sizes of an X-Omni transformer from its `config.json`."""
    for key, allowed, default in (("hidden_act", "silu", "silu"), ("use_sliding_window", False, False)):
        c.expect(key, allowed, default=default)
    section = "rope_parameters" if c.data.get("rope_parameters") else "rope_scaling"
    rope = ConfigFile(c.path, c.data.get(section) or {}, f"{section}.")
    for key in ("rope_type", "type"):
        rope.expect(key, "default", default="default")
    heads = c.size("num_attention_heads")
    if not heads:
        raise ConversionError(f"{c.path}: num_attention_heads=0 is no number of heads")
    sizes = c.sizes_by(TRANSFORMER, num_key_value_heads=heads, head_dim=c.size("hidden_size") // heads)
    layers, adapters, tail = c.size("num_hidden_layers"), sizes["n_adapter_layers"], sizes["n_head_layers"]
    if layers <= adapters + tail:
        between = f"{adapters} adapters and {tail} heads"
        raise ConversionError(f"{c.path}: num_hidden_layers={layers} leaves no language layer between {between}")
    theta, eps = c.number("rope_theta", rope.number("rope_theta", 10_000.0)), c.number("rms_norm_eps", 1e-6)
    language = dict(n_language_layers=layers - adapters - tail, rope_theta=theta, rms_eps=eps)
    return c.build(ARConfig, **sizes, **language, order=c.get("order", "raster"), attention_chunk=CHUNK)


def write_transformer(cfg: ARConfig) -> dict[str, Any]:
    """The released `config.json` without its vision section; `order` is ours and only written where it is not the released one."""
    own = {} if cfg.order == "raster" else {"order": cfg.order}
    return written(cfg, TRANSFORMER) | own | {
        "architectures": ["XOmniForCausalLM"], "model_type": "x-omni",
        "auto_map": {"AutoConfig": "configuration_xomni.XOmniConfig", "AutoModelForCausalLM": "modeling_xomni.XOmniForCausalLM"},
        "num_hidden_layers": cfg.n_layers, "rope_theta": cfg.rope_theta, "rms_norm_eps": cfg.rms_eps, "hidden_act": "silu",
        "attention_dropout": 0.0, "tie_word_embeddings": False, "use_sliding_window": False,
        "mm_special_tokens": ["<SOM>", "<EOM>", "<IMAGE>"],
    }  # fmt: skip


def read_mmdit(c: ConfigFile, semantic_dim: int, mlp_ratio: int) -> MMDiTConfig:
    """Sizes of the MMDiT from diffusers' config; the two it lacks come from tensors."""
    c.expect("patch_size", 1, default=1)
    c.expect("out_channels", None, c.data.get("in_channels"), default=None)
    sizes = c.sizes_by(MMDIT)
    return c.build(
        MMDiTConfig,
        **sizes, d_model=sizes["n_heads"] * c.size("attention_head_dim"), axes_dims=c.sizes("axes_dims_rope", (16, 56, 56)),
        semantic_dim=semantic_dim, guidance_embed=bool(c.get("guidance_embeds", False)), mlp_ratio=mlp_ratio,
        prediction=c.get("prediction", "velocity"), query_chunk=CHUNK, microbatch=4,
    )  # fmt: skip


def write_mmdit(cfg: MMDiTConfig) -> dict[str, Any]:
    """diffusers' config; `prediction` is ours and only written where it is not the released one."""
    own = {} if cfg.prediction == "velocity" else {"prediction": cfg.prediction}
    return written(cfg, MMDIT) | own | {
        "_class_name": "FluxTransformer2DModel", "patch_size": 1, "attention_head_dim": cfg.head_dim, "guidance_embeds": cfg.guidance_embed,
        "axes_dims_rope": list(cfg.axes_dims),
    }  # fmt: skip


def read_vae(c: ConfigFile) -> AutoencoderConfig:
    """Sizes of the VAE from diffusers' config, or of the identity, which diffusers does not know."""
    if c.data.get("_class_name") == IDENTITY:
        return c.build(AutoencoderConfig, kind="identity", **{key: c.number(key) for key in IDENTITY_FIELDS})
    for key, allowed, default in (("act_fn", "silu", "silu"), ("use_quant_conv", False, True), ("use_post_quant_conv", False, True)):
        c.expect(key, allowed, default=default)
    c.expect("mid_block_add_attention", True, default=True)
    sizes = c.sizes_by(VAE, in_channels=3)
    c.expect("out_channels", sizes["pixel_channels"], default=sizes["pixel_channels"])
    scale = dict(scaling_factor=c.number("scaling_factor"), shift_factor=c.number("shift_factor", 0.0))
    return c.build(AutoencoderConfig, **sizes, **scale, block_channels=c.sizes("block_out_channels"), query_chunk=2 * CHUNK, microbatch=1)


def write_vae(cfg: AutoencoderConfig) -> dict[str, Any]:
    """diffusers' config."""
    if cfg.kind == "identity":
        return {"_class_name": IDENTITY} | {key: getattr(cfg, key) for key in IDENTITY_FIELDS}
    n = len(cfg.block_channels)
    return written(cfg, VAE) | {
        "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": list(cfg.block_channels),
        "down_block_types": ["DownEncoderBlock2D"] * n, "up_block_types": ["UpDecoderBlock2D"] * n, "force_upcast": True,
        "out_channels": cfg.pixel_channels, "mid_block_add_attention": True, "sample_size": 1024, "scaling_factor": cfg.scaling_factor,
        "shift_factor": cfg.shift_factor, "use_quant_conv": False, "use_post_quant_conv": False,
    }  # fmt: skip


def read_t5(c: ConfigFile) -> T5Config:
    """Sizes of a T5 v1.1 encoder from transformers' config."""
    c.expect("feed_forward_proj", "gated-gelu")
    return c.build(T5Config, **c.sizes_by(T5, relative_attention_num_buckets=32, relative_attention_max_distance=128))


def write_t5(cfg: T5Config) -> dict[str, Any]:
    """transformers' config."""
    return written(cfg, T5) | {
        "architectures": ["T5EncoderModel"], "model_type": "t5", "num_decoder_layers": cfg.n_layers, "feed_forward_proj": "gated-gelu",
        "is_gated_act": True, "dense_act_fn": "gelu_new", "layer_norm_epsilon": 1e-6, "dropout_rate": 0.1, "is_encoder_decoder": True,
        "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip


def read_clip(c: ConfigFile) -> CLIPTextConfig:
    """Sizes of CLIP's text tower from transformers' config."""
    c.expect("hidden_act", "quick_gelu", default="quick_gelu")
    sizes, end = c.sizes_by(CLIP), c.size("eos_token_id", 49407)
    # OpenAI's files, FLUX.1's among them, say 2; transformers then pools at the largest id, which is the last of the vocabulary.
    return c.build(CLIPTextConfig, **sizes, eos_id=sizes["vocab_size"] - 1 if end == 2 else end)


def write_clip(cfg: CLIPTextConfig) -> dict[str, Any]:
    """transformers' config."""
    return written(cfg, CLIP) | {
        "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
        "eos_token_id": cfg.eos_id, "bos_token_id": 0, "pad_token_id": 1, "projection_dim": cfg.d_model, "attention_dropout": 0.0,
    }  # fmt: skip


# ---- how the model is run: only the fields that the file sets ----
def read_preprocess(c: ConfigFile) -> dict[str, Any]:
    """`vision_config.transform` as fields of `ImageLimits`."""
    fields = {f.name: c.number(f.name) for f in dataclasses.fields(ImageLimits) if c.data.get(f.name) is not None}
    c.build(ImageLimits, **fields)
    return fields


def read_decode(c: ConfigFile) -> dict[str, Any]:
    """`vision_config.decoder` as fields of `DecodeConfig`."""
    fields = {ours: c.number(key) for key, ours in (("num_inference_steps", "steps"), ("cfg_scale", "guidance")) if key in c.data}
    c.build(DecodeConfig, **fields)
    return fields


def write_decode(decode: DecodeConfig) -> dict[str, Any]:
    """The same for an export. The published pipeline takes the guidance twice, and stops where the two differ."""
    return {"num_inference_steps": decode.steps, "cfg_scale": decode.guidance, "cfg_scale_2": decode.guidance}


def read_scheduler(c: ConfigFile) -> dict[str, Any]:
    """FLUX.1's scheduler config as fields of `DecodeConfig`."""
    c.expect("base_image_seq_len", 256, default=256)
    c.expect("max_image_seq_len", 4096, default=4096)
    c.expect("use_dynamic_shifting", True, default=True)
    c.expect("shift_terminal", None, default=None)
    return {key: c.number(key) for key in ("base_shift", "max_shift") if key in c.data}


SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True,
    "base_image_seq_len": 256, "max_image_seq_len": 4096,
}  # fmt: skip
# FluxPipeline's parts: {folder: [library, class]}.
PIPELINE = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
TOKENIZER_OF = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


def read_own(c: ConfigFile) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fields of `DecodeConfig`, of the image size) that the released layout has no place for: the section `xomni_jax` of an export."""
    own = c.part("xomni_jax", {})
    decode, size = (
        {key: own.size(key) for key in keys if key in own.data} for keys in (("text_length", "pooled_length"), ("height", "width"))
    )
    return decode, size | ({"others": own.pairs("others")} if "others" in own.data else {})


def write_own(decode: DecodeConfig, pooled_length: int, size: Mapping[str, Any]) -> dict[str, Any]:
    """The same for an export; empty where all is as converted. `pooled_length` is what a conversion takes from CLIP."""
    usual = {"text_length": DecodeConfig.text_length, "pooled_length": pooled_length}
    return {key: getattr(decode, key) for key, n in usual.items() if getattr(decode, key) != n} | dict(size)


# ---- what an export restores ----
def restored(
    original: Mapping[str, Any], cfg: Any, read: Callable[[ConfigFile], Any], write: Callable[[Any], dict[str, Any]]
) -> dict[str, Any]:
    """The config that a component was converted from if it still describes `cfg`, otherwise one written from `cfg`."""
    written = write(cfg)
    try:
        return dict(original) if original and write(read(ConfigFile(Path("config.json"), original))) == written else written
    except ConversionError:  # of another model, such as that which only gave the image tokenizer
        return written


def changed(original: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The original with the fields whose value differs."""
    return {**original, **{key: value for key, value in fields.items() if key not in original or original[key] != value}}


def side_of(n: int, what: str) -> int:
    """Side of a square grid of n positions."""
    side = math.isqrt(n)
    if side * side != n:
        raise ConversionError(f"{what}: {n} positions are no square grid")
    return side
