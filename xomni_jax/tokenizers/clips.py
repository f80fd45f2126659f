"""OmniTokenizer as a tokenizer of images and clips: codes [T, Y, X], the first frame alone, then several at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from xomni_jax.models.omnitokenizer import OmniTokenizer, OmniTokenizerConfig
from xomni_jax.tokenizers.patches import squares
from xomni_jax.tokenizers.protocol import Layout


@dataclasses.dataclass(frozen=True)
class ClipTokenizer:
    """An `ImageTokenizer`. An image [B, H, W, 3] is a clip [B, 1, H, W, 3]; codes of a single time become images again."""

    config: OmniTokenizerConfig
    component: str = "omnitokenizer"
    axes: str = "T Y X"
    has_decoder: bool = True

    def __post_init__(self) -> None:
        if self.config.kind != "vq":
            raise ValueError("this OmniTokenizer has latents (kl) and no codes; use one of kind vq")

    def layout(self, height: int, width: int, frames: int = 1) -> Layout:
        """Times, rows and columns. Raises ValueError for sizes that are not whole tokens."""
        f = self.config.frame_patch
        if frames < 1 or (frames - 1) % f:
            near = 1 + max(0, round((frames - 1) / f)) * f
            raise ValueError(f"{frames} frames are not one and whole groups of {f}; the nearest number that is: {near}")
        return Layout((1 + (frames - 1) // f, *squares(height, width, self.config.patch)))

    def encode(self, params: Any, pixels: jax.Array) -> jax.Array:
        """Pixels [B, H, W, 3] or [B, frames, H, W, 3] in [-1, 1] -> codes [B, T, Y, X] int32."""
        return self._apply(params, pixels if pixels.ndim == 5 else pixels[:, None], "encode")

    def semantics(self, params: Any, codes: jax.Array) -> jax.Array:
        """Codes [B, T, Y, X] -> rows of the codebook [B, T, Y, X, C]."""
        return self._apply(params, codes, "semantics")

    def pixels(self, params: Any, codes: jax.Array) -> jax.Array:
        """Codes [B, T, Y, X] -> pixels [B, frames, H, W, 3], or [B, H, W, 3] of T = 1; float32, not clipped."""
        made = self._apply(params, codes, "decode")
        return made[:, 0] if codes.shape[1] == 1 else made

    def _apply(self, params: Any, x: jax.Array, method: str) -> jax.Array:
        return OmniTokenizer(self.config).apply({"params": params}, x, method=method)
