"""Human preference by ImageReward, a BLIP whose text reads the image. Needs torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from xomni_jax.rewards.protocol import Score
from xomni_jax.rewards.scorer import ServiceError
from xomni_jax.rewards.services.torch_scorer import (
    TorchScorer,
    centre_square,
    check_complete,
    normalised,
    pretrained,
    pretrained_model,
    published_file,
    renamed,
    torch_state,
)

_FILE, _SHA256 = "ImageReward.pt", "d71dc8d4912bc633c06ab8ef1ef6a81e8199d4369f14b47b29baf1d19de561f6"
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072  # of the head's output on the authors' test set
_TOKENS = 35  # a prompt is cut after this many, two of which are marks
_HEAD = 64  # width of one attention head in the image tower
_MLP = (0, 2, 4, 6, 7)  # the linear layers; dropout stands between them, and no activation
_VISION_NAMES = (  # of BLIP -> of transformers
    (r"cls_token", "embeddings.class_embedding"),
    (r"pos_embed", "embeddings.position_embedding"),
    (r"patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"norm\.", "post_layernorm."),
    (r"blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)


class ImageRewardScorer(TorchScorer):
    """ImageReward's score, standardised by its authors: 0 is the mean of their test set, 1 its deviation. Applies to every item.

    The middle square of the image is seen; the prompt is cut at 35 tokens.
    """

    name = "imagereward"
    published = "zai-org/ImageReward from Hugging Face (ImageReward.pt and med_config.json)"
    scale = "preference with mean 0 and deviation 1 over the authors' test set, usually -2.3 to 2"

    @dataclass(frozen=True)
    class Options(TorchScorer.Options):
        """Where the tokenizer is.

        Attributes:
          tokenizer: directory with the tokenizer files of bert-base-uncased; without one, those beside the weights.
          any_weights: accept a weight file whose sha256 is not that of the published one.
        """

        tokenizer: str = ""
        any_weights: bool = False

    def weights(self) -> Path:
        """See TorchScorer."""
        return published_file(self._folder, _FILE, _SHA256, self.options.any_weights)

    def load(self, weights: Path) -> None:
        """See TorchScorer."""
        state = torch_state(weights)
        parts: dict[str, dict[str, Any]] = {"blip.visual_encoder.": {}, "blip.text_encoder.": {}, "mlp.layers.": {}}
        rest = set()
        for key, weight in state.items():
            prefix = next((p for p in parts if key.startswith(p)), None)
            if prefix:
                parts[prefix][key.removeprefix(prefix)] = weight
            elif not re.match(r"blip\.(vision|text)_proj\.", key):  # those two are of BLIP's training
                rest.add(key)
        vision, text, self._mlp = parts.values()
        wanted = {f"{n}.{kind}" for n in _MLP for kind in ("weight", "bias")}
        check_complete(weights, wanted - set(self._mlp), rest | (set(self._mlp) - wanted))
        self._mlp = {key: weight.float().to(self._device) for key, weight in self._mlp.items()}
        vision_config, text_config = _configs(vision, self._folder, weights)
        vision = {renamed(key, _VISION_NAMES): weight for key, weight in vision.items()}
        self._vision = pretrained_model(self.name, "BlipVisionModel", weights, vision_config, vision).to(self._device)
        self._text = pretrained_model(self.name, "BlipTextModel", weights, text_config, text, add_pooling_layer=False).to(self._device)
        self._tokenizer = pretrained(self.name, "BertTokenizer", Path(self.options.tokenizer or self._folder))
        self._tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
        if len(self._tokenizer) != text_config.vocab_size:
            raise ServiceError(
                f"{self._tokenizer.name_or_path} is not the model's tokenizer: it has {len(self._tokenizer)} tokens, not "
                f"{text_config.vocab_size}; it must hold vocab.txt or tokenizer.json of bert-base-uncased"
            )

    def score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Score]:
        """See TorchScorer."""
        linear = self._torch.nn.functional.linear
        size = self._vision.config.image_size
        pixels = normalised(self._torch, [centre_square(image, size) for image in images]).to(self._device)
        tokens = self._tokenizer(list(prompts), padding="max_length", truncation=True, max_length=_TOKENS, return_tensors="pt")
        x_BD = self._text(
            input_ids=tokens.input_ids.to(self._device),
            attention_mask=tokens.attention_mask.to(self._device),
            encoder_hidden_states=self._vision(pixels).last_hidden_state,
            is_decoder=False,
        ).last_hidden_state[:, 0]
        for n in _MLP:
            x_BD = linear(x_BD, self._mlp[f"{n}.weight"], self._mlp[f"{n}.bias"])
        return [Score(value) for value in ((x_BD[:, 0] - _MEAN) / _STD).tolist()]


def _configs(vision: Mapping[str, Any], folder: Path, source: Path) -> tuple[Any, Any]:
    """Configurations of the image tower, from the shapes of its weights, and of the text tower, from med_config.json."""
    from transformers import BlipTextConfig, BlipVisionConfig

    try:
        (width, _, patch, _), (_, places, _) = vision["patch_embed.proj.weight"].shape, vision["pos_embed"].shape
        image = BlipVisionConfig(
            hidden_size=width,
            intermediate_size=len(vision["blocks.0.mlp.fc1.weight"]),
            num_hidden_layers=sum(key.endswith(".norm1.weight") for key in vision),
            num_attention_heads=width // _HEAD,
            image_size=round((places - 1) ** 0.5) * patch,
            patch_size=patch,
            layer_norm_eps=1e-6,
        )
        sizes = json.loads((folder / "med_config.json").read_text(encoding="utf-8"))
        kept = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
        text = BlipTextConfig(**{name: sizes[name] for name in kept}, layer_norm_eps=sizes["layer_norm_eps"], encoder_hidden_size=width)
    except OSError as error:
        raise ServiceError(f"{folder} holds no med_config.json; take it from zai-org/ImageReward") from error
    except (KeyError, ValueError, TypeError) as error:
        raise ServiceError(f"{source} and med_config.json are not those of ImageReward ({error}); download them again") from error
    return image, text
