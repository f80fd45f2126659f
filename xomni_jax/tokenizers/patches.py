"""Tokenizers with one code for every square of an image: SigLIP-VQ, and LlamaGen's VQ with a decoder of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from xomni_jax.models.registry import COMPONENTS
from xomni_jax.tokenizers.protocol import Layout


def squares(height: int, width: int, patch: int) -> tuple[int, int]:
    """Rows and columns of squares of an image. Raises ValueError for sizes that are not whole squares."""
    if height < patch or width < patch or height % patch or width % patch:
        near = f"{max(patch, round(height / patch) * patch)}x{max(patch, round(width / patch) * patch)}"
        raise ValueError(f"{height}x{width} pixels are not whole {patch}x{patch} tokens; the nearest size that is: {near}")
    return height // patch, width // patch


@dataclasses.dataclass(frozen=True)
class PatchTokenizer:
    """An `ImageTokenizer` over a module that has the methods `encode`, `semantics` and, if `has_decoder`, `decode`."""

    component: str
    config: Any
    has_decoder: bool
    axes: str = "Y X"

    def layout(self, height: int, width: int, frames: int = 1) -> Layout:
        """Rows and columns of squares. Raises ValueError for sizes that are not whole squares, and for clips."""
        if frames != 1:
            raise ValueError(f"{frames} frames: {self.component} takes single images; use a tokenizer of clips")
        return Layout(squares(height, width, self.config.patch))

    def encode(self, params: Any, pixels: jax.Array) -> jax.Array:
        """Pixels [B, H, W, 3] in [-1, 1] -> codes [B, Y, X] int32."""
        return self._apply(params, pixels, "encode")

    def semantics(self, params: Any, codes: jax.Array) -> jax.Array:
        """Codes [B, Y, X] -> [B, Y, X, C]."""
        return self._apply(params, codes, "semantics")

    def pixels(self, params: Any, codes: jax.Array) -> jax.Array:
        """Codes [B, Y, X] -> pixels [B, H, W, 3], float32, not clipped."""
        return self._apply(params, codes, "decode")

    def _apply(self, params: Any, x: jax.Array, method: str) -> jax.Array:
        return COMPONENTS[self.component].module(self.config).apply({"params": params}, x, method=method)
