"""Human preference by PickScore, a CLIP ViT-H/14 trained on Pick-a-Pic. Needs torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from xomni_jax.rewards.services.clip_towers import TwoTowerScorer
from xomni_jax.rewards.services.torch_scorer import TorchScorer


class PickScorer(TwoTowerScorer):
    """The model's logit of the image for its prompt. Applies to every item. The prompt is cut at 77 tokens."""

    name = "pickscore"
    published = "yuvalkirstain/PickScore_v1 from Hugging Face (model and processor files)"
    scale = "logit of image and prompt, usually 18 to 24; 0.7 to 0.9 with --formula logit/26"
    range = (-101.0, 101.0)

    @dataclass(frozen=True)
    class Options(TorchScorer.Options):
        """In which scale.

        Attributes:
          formula: logit, as the authors use it, or logit/26, as flow_grpo and UniRL do.
        """

        formula: Literal["logit", "logit/26"] = "logit"

    def variant(self) -> tuple[str, ...]:
        """See TorchScorer."""
        return (self.options.formula,)

    def value(self, cosine: float, logit_scale: float) -> float:
        """See TwoTowerScorer."""
        return cosine * logit_scale / (26 if self.options.formula == "logit/26" else 1)
