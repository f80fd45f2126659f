"""Human preference by HPSv2, a CLIP ViT-H/14 trained on rankings of images of one prompt. Needs torch."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from xomni_jax.rewards.scorer import ServiceError, need
from xomni_jax.rewards.services.clip_towers import ClipTowers, TwoTowerScorer
from xomni_jax.rewards.services.torch_scorer import (
    CLIP_MEAN,
    CLIP_STD,
    TorchScorer,
    pretrained,
    pretrained_model,
    published_file,
    renamed,
    torch_state,
)

FILES = {  # version: name and sha256 in xswu/HPSv2, which tell the versions apart: their layouts are the same
    "v2.0": ("HPS_v2_compressed.pt", "07cb0d20626232204ca3a6ec53ff5984e7e53212a8a7b0e0ec2bac1bdaf125a1"),
    "v2.1": ("HPS_v2.1_compressed.pt", "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837"),
}
_VISION_HEAD, _TEXT_HEAD = 80, 64  # widths of one attention head in ViT-H/14, which the file does not tell
_NAMES = (  # of open_clip -> of transformers
    (r"visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"visual\.proj", "visual_projection.weight"),
    (r"text_projection", "text_projection.weight"),
    (r"token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"ln_final\.", "text_model.final_layer_norm."),
    (r"visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"transformer\.resblocks\.", "text_model.encoder.layers."),
)
_IN_LAYER = ((".ln_", ".layer_norm"), (".attn.", ".self_attn."), (".c_fc.", ".fc1."), (".c_proj.", ".fc2."))


class HPSv2Scorer(TwoTowerScorer):
    """Cosine of HPSv2's features of the image and the prompt, in float32. Applies to every item.

    Only images of the same prompt may be compared, and values of v2.0 and v2.1 may not. The whole image is shrunk to 224 pixels and
    padded with black. The prompt is cut at 77 tokens.
    """

    name = "hpsv2"
    published = "xswu/HPSv2 from Hugging Face (HPS_v2.1_compressed.pt or HPS_v2_compressed.pt)"
    scale = "cosine of image and prompt, usually 0.14 to 0.34 (v2.1) or 0.23 to 0.29 (v2.0); published tables show 100 times it"
    range = (-1.001, 1.001)

    @dataclass(frozen=True)
    class Options(TorchScorer.Options):
        """Which of the published models, and how it sees images.

        Attributes:
          version: v2.1 (file HPS_v2.1_compressed.pt) or v2.0 (HPS_v2_compressed.pt).
          tokenizer: directory with the tokenizer files of any CLIP, such as openai/clip-vit-large-patch14; without one, those beside
            the weights.
          resize: antialias, as the package hpsv2 resizes today; plain, as it did in 2023, when the published tables were made; pil, as
            other CLIP scorers do.
          any_weights: accept a weight file whose sha256 is not that of the published one.
        """

        version: Literal["v2.0", "v2.1"] = "v2.1"
        tokenizer: str = ""
        resize: Literal["antialias", "plain", "pil"] = "antialias"
        any_weights: bool = False

    def weights(self) -> Path:
        """See TorchScorer."""
        return published_file(self._folder, *FILES[self.options.version], self.options.any_weights)

    def load(self, weights: Path) -> None:
        """See TorchScorer."""
        need("ftfy", self.name, extra=self.name)
        state = torch_state(weights).get("state_dict")
        if not isinstance(state, Mapping):
            raise ServiceError(f"{weights} has no 'state_dict'; take the file of that name from xswu/HPSv2")
        model = pretrained_model(self.name, "CLIPModel", weights, clip_config(state, weights), clip_weights(state))
        tokenizer = pretrained(self.name, "CLIPTokenizer", Path(self.options.tokenizer or self._folder))
        self._towers = ClipTowers(model, tokenizer, self._device)

    def variant(self) -> tuple[str, ...]:
        """See TorchScorer."""
        return self.options.version, self.options.resize

    def pixels(self, images: Sequence[Image.Image]) -> Any:
        """See TwoTowerScorer."""
        torch = self._torch
        mean, std = (torch.tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
        return torch.stack([(letterbox(torch, image, self._towers.size, self.options.resize) - mean) / std for image in images])

    def text(self, prompt: str) -> str:
        """See TwoTowerScorer: cleaned as open_clip does."""
        return clean(prompt)

    def value(self, cosine: float, logit_scale: float) -> float:
        """See TwoTowerScorer."""
        return cosine


def clean(prompt: str) -> str:
    """The prompt with broken Unicode mended, HTML entities resolved, single spaces and lower case."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split()).lower()


def letterbox(torch: Any, image: Image.Image, size: int, resize: str) -> Any:
    """float32 [3, size, size] in about [0, 1]: the long side resized to `size`, black on both sides of the short one."""
    width, height = (max(1, round(side * (size / max(image.size)))) for side in image.size)
    if resize == "pil":
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(image.height, image.width, 3)
    pixels = pixels.permute(2, 0, 1).float()[None] / 255
    if image.size != (width, height):
        pixels = torch.nn.functional.interpolate(pixels, (height, width), mode="bicubic", antialias=resize == "antialias")
    left, top = (size - width) // 2, (size - height) // 2
    return torch.nn.functional.pad(pixels[0], (left, size - width - left, top, size - height - top))


def clip_config(state: Mapping[str, Any], source: Path) -> Any:
    """transformers' CLIPConfig of a ViT-H/14 from the shapes of open_clip's weights. ServiceError when it is no CLIP."""
    from transformers import CLIPConfig

    def tower(prefix: str, width: int, head: int, **more: int) -> dict[str, Any]:
        layers = [key for key in state if key.startswith(prefix) and key.endswith(".ln_1.weight")]
        return {
            "hidden_size": width, "num_attention_heads": width // head, "num_hidden_layers": len(layers),
            "intermediate_size": len(state[f"{prefix}0.mlp.c_fc.weight"]), "hidden_act": "gelu", **more,
        }  # fmt: skip

    try:
        (width, _, patch, _), (places, _) = state["visual.conv1.weight"].shape, state["visual.positional_embedding"].shape
        (vocabulary, text_width), (length, _) = state["token_embedding.weight"].shape, state["positional_embedding"].shape
        side = round((places - 1) ** 0.5) * patch
        return CLIPConfig(
            projection_dim=state["text_projection"].shape[1],
            vision_config=tower("visual.transformer.resblocks.", width, _VISION_HEAD, patch_size=patch, image_size=side),
            text_config=tower(
                "transformer.resblocks.", text_width, _TEXT_HEAD, vocab_size=vocabulary, max_position_embeddings=length,
                bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1,
            ),
        )  # fmt: skip
    except (KeyError, ValueError) as error:
        raise ServiceError(f"{source} does not hold the weights of HPSv2 in open_clip's layout ({error}); download it again") from error


def clip_weights(state: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's weights under the names of transformers; the fused query, key and value are split. Unknown names stay."""
    out: dict[str, Any] = {}
    for key, weight in state.items():
        key, weight = renamed(key, _NAMES), weight.float()
        for old, new in _IN_LAYER:
            key = key.replace(old, new)
        if ".in_proj_" in key:
            out |= {re.sub("in_proj_(weight|bias)", rf"{n}_proj.\1", key): part for n, part in zip("qkv", weight.chunk(3))}
        else:
            out[key] = weight.T.contiguous() if key in ("visual_projection.weight", "text_projection.weight") else weight
    return out
