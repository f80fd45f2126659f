"""Human preference by HPSv3, a Qwen2-VL-7B that rates image and prompt by one number. Needs torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from xomni_jax.rewards.official_prompt import OfficialPrompt, read_prompt
from xomni_jax.rewards.protocol import Score
from xomni_jax.rewards.scorer import ServiceError
from xomni_jax.rewards.services.torch_scorer import (
    TorchScorer,
    check_complete,
    existing_file,
    pretrained,
    pretrained_model,
    safetensors_state,
)

_ORIGIN = "https://github.com/MizzenAI/HPSv3"
PROMPT = OfficialPrompt(
    "hpsv3/dataset/data_collator_qwen.py",
    "18957b68f6dbfb1d9862e970e084c1093656df0dfe2b4468253879198cc4d064",
    constants=("INSTRUCTION", "prompt_with_special_token"),
)
_REWARD = "<|Reward|>"  # the token at whose place the head reads
_PIXELS = 256 * 28 * 28  # of an image after resizing, in whole cells of 28 x 28
_HEAD = (0, 3, 5)  # the linear layers; ReLU stands between them
_CHAT = (  # Qwen2-VL's template with one image and its default system message
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{text}<|im_end|>\n"
    "<|im_start|>assistant\n"
)


class HPSv3Scorer(TorchScorer):
    """HPSv3's mean rating of the image for its prompt, unbounded. Applies to every item. Detail: sigma, the model's second output.

    Positions are one-dimensional, as in the authors' code, with which the model was trained. Marks of the chat format are taken out of
    the prompt.
    """

    name = "hpsv3"
    published = "MizzenAI/HPSv3 from Hugging Face (HPSv3.safetensors)"
    scale = "mean rating, unbounded, usually -1 to 12"

    @dataclass(frozen=True)
    class Options(TorchScorer.Options):
        """The parts of the model that are published elsewhere, and how it is computed.

        Attributes:
          base: directory with configuration, tokenizer and preprocessing of Qwen/Qwen2-VL-7B-Instruct (its weights are not needed);
            without one, those beside the weights.
          official_code: a clone of github.com/MizzenAI/HPSv3, or the folder in which pip installed hpsv3; the prompt is read from it.
          any_prompt: accept a prompt that is not the published one.
          dtype: of the language model; the head is always float32.
        """

        batch: int = 4
        base: str = ""
        official_code: str = ""
        any_prompt: bool = False
        dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def weights(self) -> Path:
        """See TorchScorer."""
        self._prompt = read_prompt(PROMPT, self.options.official_code, _ORIGIN, self.name, self.options.any_prompt)
        return existing_file(self._folder, "HPSv3.safetensors")

    def load(self, weights: Path) -> None:
        """See TorchScorer."""
        base = Path(self.options.base or self._folder)
        self._tokenizer = pretrained(self.name, "AutoTokenizer", base)
        self._tokenizer.add_special_tokens({"additional_special_tokens": [_REWARD]})
        self._marks = re.compile("|".join(map(re.escape, self._tokenizer.get_added_vocab())))
        self._processor = pretrained(self.name, "Qwen2VLImageProcessorPil", base)
        config = pretrained(self.name, "Qwen2VLConfig", base)
        state = safetensors_state(weights)
        head = {key.removeprefix("rm_head."): state.pop(key) for key in list(state) if key.startswith("rm_head.")}
        wanted = {f"{n}.{kind}" for n in _HEAD for kind in ("weight", "bias")}
        check_complete(weights, wanted - set(head), set(head) - wanted)
        self._head = {key: weight.float().to(self._device) for key, weight in head.items()}
        state.pop("lm_head.weight", None)  # of the language model that rates instead of writing
        state = {re.sub(r"^model\.", "language_model.", key): weight for key, weight in state.items()}
        config.text_config.vocab_size = len(state.get("language_model.embed_tokens.weight", ()))
        if config.text_config.vocab_size != len(self._tokenizer):
            raise ServiceError(
                f"{weights} has {config.text_config.vocab_size} tokens, the tokenizer in {base} {len(self._tokenizer)}; "
                "--base must be Qwen/Qwen2-VL-7B-Instruct"
            )
        self._model = pretrained_model(self.name, "Qwen2VLModel", weights, config, state, self.options.dtype).to(self._device)

    def variant(self) -> tuple[str, ...]:
        """See TorchScorer."""
        return (self.options.dtype,)

    def score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Score]:
        """See TorchScorer."""
        torch, model = self._torch, self._model
        pixels = self._processor([resized(image) for image in images], return_tensors="pt").to(self._device)
        cells = (pixels.image_grid_thw.prod(-1) // self._processor.merge_size**2).tolist()
        texts = [self._text(prompt, count) for prompt, count in zip(prompts, cells)]
        tokens = self._tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(self._device)
        x_BLD = model.language_model.embed_tokens(tokens.input_ids)
        features = torch.cat(model.get_image_features(pixels.pixel_values, pixels.image_grid_thw).pooler_output).to(x_BLD.dtype)
        x_BLD = x_BLD.masked_scatter((tokens.input_ids == model.config.image_token_id)[..., None], features)
        # Without ids and positions the language model counts positions along the text, as it did in training.
        x_BLD = model.language_model(inputs_embeds=x_BLD, attention_mask=tokens.attention_mask, use_cache=False).last_hidden_state
        x_BD = x_BLD[tokens.input_ids == self._tokenizer.convert_tokens_to_ids(_REWARD)].float()
        for n in _HEAD:
            x_BD = torch.nn.functional.linear(x_BD.relu() if n else x_BD, self._head[f"{n}.weight"], self._head[f"{n}.bias"])
        return [Score(mean, None, {"sigma": sigma}) for mean, sigma in x_BD.tolist()]

    def _text(self, prompt: str, cells: int) -> str:
        instruction, question = self._prompt
        text = instruction.replace("{text_prompt}", self._marks.sub("", prompt)) + question
        return _CHAT.format(image="<|image_pad|>" * cells, text=text)


def resized(image: Image.Image) -> Image.Image:
    """The image with about 256 cells of 28 x 28 pixels in its own proportions."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    height, width = smart_resize(image.height, image.width, 28, _PIXELS, _PIXELS)
    return image.resize((width, height), Image.Resampling.BICUBIC)
