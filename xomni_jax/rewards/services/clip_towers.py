"""The two towers of CLIP in transformers, and the scorers that compare an image with its prompt by them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from xomni_jax.rewards.protocol import Score
from xomni_jax.rewards.scorer import ServiceError
from xomni_jax.rewards.services.torch_scorer import TorchScorer, pretrained, pretrained_model, unit


class ClipTowers:
    """transformers' CLIPModel with its tokenizer, which may be None where no text is read.

    Attributes:
      logit_scale: factor of the cosine in the model's own logits, about 100.
      size: pixels of the square that the image tower sees.
    """

    def __init__(self, model: Any, tokenizer: Any, device: str):
        tokens = model.config.text_config.vocab_size
        if tokenizer is not None and tokenizer.eos_token_id != tokens - 1:  # the text tower reads its features there
            raise ServiceError(
                f"{tokenizer.name_or_path} is not the model's tokenizer: it ends texts with token {tokenizer.eos_token_id}, not "
                f"{tokens - 1}; it must hold vocab.json and merges.txt, or tokenizer.json, of a CLIP"
            )
        self._model, self._tokenizer, self._device = model.to(device), tokenizer, device
        self.logit_scale = model.logit_scale.exp().item()
        self.size = model.config.vision_config.image_size

    def image_features(self, pixels_BCYX: Any) -> Any:
        """Unit features [B, D] of normalised images."""
        return unit(self._model.get_image_features(pixel_values=pixels_BCYX.to(self._device)).pooler_output)

    def text_features(self, prompts: Sequence[str]) -> Any:
        """Unit features [B, D]. A prompt is cut at the model's 77 tokens; one that occurs several times is computed once."""
        different = list(dict.fromkeys(prompts))
        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(different, padding=True, truncation=True, max_length=length, return_tensors="pt").to(self._device)
        features = unit(self._model.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output)
        return features[[different.index(prompt) for prompt in prompts]]


class TwoTowerScorer(TorchScorer):
    """A value made from the cosine between the features of an image and of its prompt; preprocessing on PIL images, as published."""

    def load(self, weights: Path) -> None:
        """See TorchScorer."""
        model = pretrained_model(self.name, "CLIPModel", weights)
        self._towers = ClipTowers(model, pretrained(self.name, "CLIPTokenizer", weights), self._device)
        self._processor = pretrained(self.name, "CLIPImageProcessorPil", weights)

    def pixels(self, images: Sequence[Image.Image]) -> Any:
        """Normalised images, float32 [B, 3, size, size]."""
        return self._processor(list(images), return_tensors="pt").pixel_values

    def text(self, prompt: str) -> str:
        """What the text tower reads."""
        return prompt

    def value(self, cosine: float, logit_scale: float) -> float:
        """The score."""
        raise NotImplementedError

    def score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Score]:
        """See TorchScorer."""
        features_BD, texts_BD = (
            self._towers.image_features(self.pixels(images)),
            self._towers.text_features([self.text(p) for p in prompts]),
        )
        cosines = (features_BD * texts_BD).sum(-1).tolist()
        return [Score(self.value(cosine, self._towers.logit_scale)) for cosine in cosines]
