"""Class numbers in the place of texts, for a class-conditional model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from xomni_jax.sequence.tokenizer import TokenSequence


class ClassTokenizer:
    """What `MultimodalTokenizer` is to a model of text: a prompt is the number of a class, one token, which the codes follow at once.

    Attributes:
      vocab_size: number of classes and one more, the id that stands for no class; the id of code 0.
      image_vocab_size: number of codes.
      pad: any id.
      columns: of the grid of codes.
    """

    def __init__(self, classes: int, columns: int, codes: int):
        self.vocab_size, self.pad, self.columns, self.image_vocab_size = classes + 1, classes, columns, codes

    def encode_text(self, text: str) -> np.ndarray:
        """The number of a class -> its id [1]."""
        if not text.strip().isdecimal() or int(text) >= self.pad:
            raise ValueError(f"The prompt {text.strip()[:60]!r} is no class of this model; give a number from 0 to {self.pad - 1}.")
        return np.array([int(text)], np.int32)

    def generation_prompt(self, prompt: str, *shape: int, conditions: Sequence[np.ndarray] = ()) -> np.ndarray:
        """The class as the prompt of an image -> ids [1]. ValueError for images, and a grid of other columns than the model's positions."""
        if conditions:
            raise ValueError("This model draws images of numbered classes and starts from no images; leave them out.")
        if shape[-1] != self.columns:
            raise ValueError(f"This model draws images of {self.columns} columns of codes, not {shape[-1]}; choose another width.")
        return self.encode_text(prompt)

    def image_prefix(self, *shape: int) -> np.ndarray:
        """No class -> ids [1]; the negative prompt of guidance."""
        return np.array([self.pad], np.int32)

    def generation_sequence(
        self,
        prompt: str,
        codes_YX: np.ndarray,
        order_T: np.ndarray | None = None,
        conditions: Sequence[np.ndarray] = (),
        hidden: bool = False,
    ) -> TokenSequence:
        """A class, or none where the prompt is empty, and the codes of its image, which are the targets.

        Raises:
          ValueError: the codes have an order of their own or follow images, which these models were not made for.
        """
        if order_T is not None or conditions:
            raise ValueError("This model draws an image of a numbered class row by row; it takes neither other orders nor images.")
        first = self.generation_prompt(prompt, *codes_YX.shape) if prompt else self.image_prefix(*codes_YX.shape)
        ids_L = np.concatenate([first, codes_YX.ravel() + self.vocab_size]).astype(np.int32)
        return TokenSequence(ids_L, np.arange(len(ids_L)) >= len(first))

    @property
    def text(self) -> Any:
        """Refuses: there is no text."""
        raise ValueError("This model draws images of numbered classes and answers no questions; use a model of text.")
