"""Text, read by GOT-OCR 2.0 (arXiv 2409.01704), the second recogniser of X-Omni's OCR reward. Needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from xomni_jax.rewards.protocol import Item, Score
from xomni_jax.rewards.scorer import ServiceError
from xomni_jax.rewards.services.torch_scorer import TorchScorer, pretrained, pretrained_model
from xomni_jax.rewards.text_metrics import compare_text

_END = "<|im_end|>"
_NO_REPEAT = 20  # tokens: as the original code has it; without it an image without text may be read as one word for ever


class GotOCRScorer(TorchScorer):
    """How well the text that GOT-OCR 2.0 reads matches targets["text"], in [0, 1]. Does not apply to items without that target.

    An image in which nothing is read is scored: its 0 is a measurement. One whose reading does not end is not scored. The detail of a
    score is that of `compare_text`.
    """

    name = "got_ocr"
    scale = "likeness of the text that was read to the wanted one, 0 to 1"
    range = (0.0, 1.0)

    published = "stepfun-ai/GOT-OCR-2.0-hf from Hugging Face"

    @dataclass(frozen=True)
    class Options(TorchScorer.Options):
        """How the image is read and compared.

        Attributes:
          patches: read an image in up to this many tiles of 1,024 pixels and as a whole, for small text; 1 reads it as a whole.
          max_tokens: of the text that is read; an image with more is not scored.
          formula: how texts are compared; auto is edit similarity up to 20 characters, recall with a length penalty above.
        """

        patches: int = 1
        max_tokens: int = 512
        formula: Literal["auto", "edit", "substring", "recall"] = "auto"

    def load(self, weights: Path) -> None:
        """See TorchScorer."""
        o = self.options
        if min(o.patches, o.max_tokens) < 1:
            raise ServiceError(f"scorer {self.name!r}: --patches and --max-tokens must be at least 1")
        kind = pretrained(self.name, "AutoConfig", weights).model_type
        if kind != "got_ocr2":
            raise ServiceError(f"{weights} holds a model of type {kind!r}, not {self.published}")
        self._processor = pretrained(self.name, "GotOcr2Processor", weights, backend="pil")
        self._processor.tokenizer.padding_side = "left"
        dtype = "float32" if self._device == "cpu" else "bfloat16"
        self._model = pretrained_model(self.name, "GotOcr2ForConditionalGeneration", weights, dtype=dtype).to(self._device)

    def variant(self) -> tuple[str, ...]:
        """See TorchScorer."""
        o = self.options
        return (o.formula, *((f"patches-{o.patches}",) if o.patches > 1 else ()))

    def score(self, images: Sequence[np.ndarray], items: Sequence[Item]) -> list[Score]:
        """See Scorer. ValueError when a text target is not a string or a list of strings with letters in them."""
        scores = [Score(None)] * len(images)
        asked = [n for n, item in enumerate(items) if item["targets"].get("text")]
        for first in range(0, len(asked), self.options.batch):
            part = asked[first : first + self.options.batch]
            for n, (text, ended) in zip(part, self._generate([images[n] for n in part]), strict=True):
                if ended:
                    value, detail = compare_text(items[n]["targets"]["text"], text, self.options.formula)
                    scores[n] = Score(value, None, detail)
                else:
                    scores[n] = Score(None, f"the reading did not end within {self.options.max_tokens} tokens")
        return scores

    def _generate(self, images: Sequence[np.ndarray]) -> list[tuple[str, bool]]:
        """The text of each image, and whether it came to its end."""
        how = {"crop_to_patches": True, "max_patches": self.options.patches} if self.options.patches > 1 else {}
        inputs = self._processor([Image.fromarray(image) for image in images], padding=True, return_tensors="pt", **how)
        inputs = inputs.to(self._model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
        tokenizer, o = self._processor.tokenizer, self.options
        stop = {"stop_strings": _END, "tokenizer": tokenizer, "max_new_tokens": o.max_tokens, "no_repeat_ngram_size": _NO_REPEAT}
        with self._torch.inference_mode():
            ids = self._model.generate(**inputs, do_sample=False, **stop)[:, inputs["input_ids"].shape[1] :]
        ends = {tokenizer.convert_tokens_to_ids(_END), tokenizer.eos_token_id, tokenizer.pad_token_id}
        texts = [text.partition(_END)[0].strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        return [(text, len(row) < o.max_tokens or row[-1] in ends) for text, row in zip(texts, ids.tolist(), strict=True)]
