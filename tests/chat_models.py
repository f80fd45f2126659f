"""Vision-language models of random weights, in the layout in which they are published. Need torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from xomni_jax.sequence.tokenizer import TINY_TOKENIZER

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"bos_token_id": None, "eos_token_id": None, "initializer_range": 0.3}  # at the usual 0.02 an image changes no answer
VISION = {"hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.3}


def tokenizer_of(image, *special):
    """The tiny tokenizer with the tokens of a model, and its chat template."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(TINY_TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = TEMPLATE.replace("IMAGE", image)
    return tokenizer, tokenizer.convert_tokens_to_ids(list(special))


def qwen():
    """Qwen2.5-VL: (model, tokenizer, processor)."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    names = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer, (start, end, image, video) = tokenizer_of("<|vision_start|><|image_pad|><|vision_end|>", *names)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = TEXT | {"vocab_size": len(tokenizer), "max_window_layers": 1, "rope_parameters": rope}
    vision = VISION | {"depth": 1, "num_heads": 2, "out_hidden_size": 32, "fullatt_block_indexes": [0], "window_size": 112}
    ids = {"image_token_id": image, "video_token_id": video, "vision_start_token_id": start, "vision_end_token_id": end}
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))
    return model, tokenizer, Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112})


def llava():
    """LLaVA with a CLIP encoder and a Qwen2 language model, whose processor needs no torchvision."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, Qwen2Config
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer, (image,) = tokenizer_of("<image>", "<image>")
    vision = CLIPVisionConfig(**VISION, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    config = LlavaConfig(
        vision_config=vision, text_config=Qwen2Config(**TEXT, vocab_size=len(tokenizer)), image_token_index=image, vision_feature_layer=-1
    )
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    how = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = LlavaProcessor(pixels, tokenizer, chat_template=tokenizer.chat_template, image_token="<image>", **how)
    return LlavaForConditionalGeneration(config), tokenizer, processor


def write(make: Callable[[], Any], folder: Path, seed: int = 0) -> Path:
    """Saves what `make` makes under the seed, and returns the folder."""
    import torch

    torch.manual_seed(seed)
    model, tokenizer, processor = make()
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    return folder
