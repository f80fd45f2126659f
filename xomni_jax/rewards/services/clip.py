"""Likeness of image and prompt by CLIP ViT-L/14, in the scale of several publications. Needs torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from xomni_jax.rewards.services.clip_towers import TwoTowerScorer
from xomni_jax.rewards.services.torch_scorer import TorchScorer

FORMULAS = {
    "cosine": lambda cosine, scale: cosine,
    "logit": lambda cosine, scale: scale * cosine,
    "logit/30": lambda cosine, scale: scale * cosine / 30,
    "torchmetrics": lambda cosine, scale: max(100 * cosine, 0.0),
    "clipscore": lambda cosine, scale: 2.5 * max(cosine, 0.0),
}


class CLIPScorer(TwoTowerScorer):
    """Cosine of CLIP's features of the image and the prompt, or a published multiple of it. Applies to every item.

    The prompt is cut at 77 tokens.
    """

    name = "clip"
    published = "openai/clip-vit-large-patch14 from Hugging Face"
    scale = "cosine of image and prompt, usually 0.15 to 0.35; --formula multiplies it"
    range = (-101.0, 101.0)

    @dataclass(frozen=True)
    class Options(TorchScorer.Options):
        """How the cosine becomes the score.

        Attributes:
          formula: cosine; logit (about 100 times it); logit/30, as flow_grpo and UniRL use it; torchmetrics (100 times it, at least 0);
            clipscore (2.5 times it, at least 0; its template is "A photo depicts {prompt}").
          template: what the text tower reads; {prompt} stands for the prompt.
        """

        formula: Literal["cosine", "logit", "logit/30", "torchmetrics", "clipscore"] = "cosine"
        template: str = "{prompt}"

        def __post_init__(self) -> None:
            super().__post_init__()
            if "{prompt}" not in self.template:
                raise ValueError(f"template={self.template!r} must contain {{prompt}}")

    def variant(self) -> tuple[str, ...]:
        """See TorchScorer."""
        return self.options.formula, *([self.options.template] if self.options.template != "{prompt}" else [])

    def text(self, prompt: str) -> str:
        """See TwoTowerScorer."""
        return self.options.template.replace("{prompt}", prompt)

    def value(self, cosine: float, logit_scale: float) -> float:
        """See TwoTowerScorer."""
        return FORMULAS[self.options.formula](cosine, logit_scale)
