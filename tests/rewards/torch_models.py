"""Small seeded checkpoints in published layouts, and images of all shapes, for the scorers that run torch models."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from tests.encoder_tokenizers import write_clip

PROMPTS = ["a red sign", "a sign that says red", "", "the " * 90 + "end", "Red  SIGN &amp; Thé", "a red sign", "{prompt} {0}"]


def images() -> list[np.ndarray]:
    """One uint8 [Y, X, 3] image per prompt: square, wide, tall, tiny, one pixel, large; smooth, so that resizing keeps something."""
    rng = np.random.default_rng(7)
    out = []
    for height, width in ((28, 28), (31, 90), (77, 40), (3, 5), (1, 1), (200, 160), (64, 65)):
        small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8))
        out.append(np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)))
    return out


def items(prompts=PROMPTS) -> list[dict]:
    """Items of a request with these prompts."""
    return [{"prompt": prompt, "targets": {}} for prompt in prompts]


def values(scorer, chosen=None) -> np.ndarray:
    """Scores of `images()` for PROMPTS, or of those at the indices `chosen`, in their order."""
    chosen = range(len(PROMPTS)) if chosen is None else chosen
    scores = scorer.score([images()[n] for n in chosen], [items()[n] for n in chosen])
    assert [s.error for s in scores] == [None] * len(scores)
    return np.array([s.value for s in scores])


def check_independent(name: str, options: dict, build) -> None:
    """The score of an image depends neither on the batch size nor on its neighbours."""
    alone = np.concatenate([values(build(name, options | {"batch": 1}), [n]) for n in range(2)])
    together, order = build(name, options | {"batch": 3}), [3, 1, 0, 6]
    np.testing.assert_allclose(values(together)[:2], alone, atol=1e-5)
    np.testing.assert_allclose(values(together, order), values(together)[order], atol=1e-5)


def files_of_every_kind() -> list[tuple[bytes, np.ndarray]]:
    """Encoded images that are not RGB, each with the pixels that a scorer must see."""
    image, out = Image.fromarray(images()[5]), []
    transparent = image.convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize(image.size))
    for kind in (transparent, image.convert("P"), image.convert("L"), image.convert("LA"), image.convert("1")):
        file = io.BytesIO()
        kind.save(file, "PNG")
        out.append((file.getvalue(), np.asarray(kind.convert("RGB"))))
    return out


def write_clip_model(folder: Path, logit_scale: float = 3.0, seed: int = 0) -> Path:
    """transformers' CLIPModel with tokenizer and preprocessing, of width 16, for images of 28 pixels."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    torch.manual_seed(seed)
    tokens = write_clip(folder)
    text = {"vocab_size": tokens, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"bos_token_id": tokens - 2, "eos_token_id": tokens - 1, "pad_token_id": tokens - 1}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12, logit_scale_init_value=logit_scale))
    randomise(model)
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def randomise(model) -> None:
    """Weights large enough that images and prompts differ in what comes out."""
    import torch

    for name, p in model.named_parameters():
        if p.ndim:
            torch.nn.init.normal_(p, mean=1.0 if p.ndim == 1 and "weight" in name else 0.0, std=0.2)
