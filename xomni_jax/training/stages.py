"""Which parameters learn in which phase of training the unified transformer (X-Omni section 3.2)."""

from __future__ import annotations

# Phase -> path patterns of the parameters that learn. Pre-training stage 1 trains what is new beside the language model:
# vision layers, image embedding, norm and head. Stages 2 and 3, fine-tuning and RL train everything.
FREEZE: dict[str, tuple[str, ...]] = {
    "vision": ("adapters/.*", "heads/.*", "mm_embed/.*", "mm_norm/.*", "mm_head/.*"),
    "all": (".*",),
}
