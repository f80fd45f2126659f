"""A vision-language model in this process, such as Qwen2.5-VL: any directory that transformers reads. Needs torch."""

from __future__ import annotations

import inspect
import io
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from xomni_jax.rewards.chat.messages import ChatUnavailable, Question
from xomni_jax.rewards.chat.replies import Completion, Unreadable, completion
from xomni_jax.rewards.model_files import model_hash
from xomni_jax.rewards.scorer import ServiceError, need
from xomni_jax.rewards.services.torch_scorer import check_complete, pretrained, torch_and_device

_LIKELIEST = 20


class LocalModel:
    """See ChatModel. Answers one batch at a time.

    Args:
      device: where torch runs it; "" is CUDA if there is one, else the CPU.
      batch: questions at a time; the replies do not depend on it.

    Raises:
      ServiceError: torch is missing, or the directory holds no such model.
    """

    def __init__(self, folder: str | Path, device: str = "", batch: int = 1):
        folder = Path(folder)
        self._torch, device = torch_and_device("judge", device)
        self._processor = _processor(folder)
        model, info = pretrained("judge", "AutoModelForImageTextToText", folder, dtype="auto", output_loading_info=True)
        check_complete(folder, info["missing_keys"], info["unexpected_keys"])
        self._model, self._lock, self._batch = model.eval().to(device), threading.Lock(), batch
        self._tokenizer = self._processor.tokenizer
        self._tokenizer.padding_side = "left"  # so that all replies of a batch start at the same place
        self._texts: list[str] = []
        self.name, self.model_hash = folder.resolve().name, model_hash(folder)
        self.settings = {"version": self.model_hash[:16], "dtype": str(self._model.dtype).removeprefix("torch.")}

    def complete(self, question: Question, max_tokens: int) -> Completion:
        """See ChatModel."""
        return self._complete([question], max_tokens)[0]

    def complete_all(self, questions: Sequence[Question], max_tokens: int) -> list[Completion | ChatUnavailable | Unreadable]:
        """See ChatModel."""
        return [reply for part in self._batches(questions) for reply in self._complete(part, max_tokens)]

    def first_tokens(self, questions: Sequence[Question], words: Sequence[str]) -> list[dict[str, float] | ChatUnavailable | Unreadable]:
        """See ChatModel. Softmax in float32 over the whole vocabulary, of the logits as the model gives them."""
        return [tokens for part in self._batches(questions) for tokens in self._first_tokens(part, words)]

    def close(self) -> None:
        """Frees the model."""
        del self._model

    def _batches(self, questions: Sequence[Question]) -> list[Sequence[Question]]:
        return [questions[n : n + self._batch] for n in range(0, len(questions), self._batch)]

    def _complete(self, questions: Sequence[Question], max_tokens: int) -> list[Completion]:
        with self._lock, self._torch.inference_mode():
            inputs = self._inputs(questions)
            replies = self._model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        ends = self._model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        cut = [len(ids) == max_tokens and not ends & set(ids) for ids in replies.tolist()]
        return [completion(text, c) for text, c in zip(self._tokenizer.batch_decode(replies, skip_special_tokens=True), cut)]

    def _first_tokens(self, questions: Sequence[Question], words: Sequence[str]) -> list[dict[str, float]]:
        torch = self._torch
        if not self._texts:
            self._texts = self._tokenizer.batch_decode([[n] for n in range(len(self._tokenizer))])
        wanted = [n for n, text in enumerate(self._texts) if text.strip().lower() in words]
        with self._lock, torch.inference_mode():
            logits_BV = self._model(**self._inputs(questions), logits_to_keep=1).logits[:, -1]
            chances_BV = logits_BV.float().softmax(-1)[:, : len(self._texts)].cpu()
        found = []
        for chances_V, likeliest in zip(chances_BV, chances_BV.topk(_LIKELIEST).indices.tolist(), strict=True):
            tokens: dict[str, float] = {}
            for n in dict.fromkeys([*likeliest, *wanted]):
                tokens[self._texts[n]] = tokens.get(self._texts[n], 0.0) + chances_V[n].item()
            found.append(tokens)
        return found

    def _inputs(self, questions: Sequence[Question]) -> Any:
        images = [[Image.open(io.BytesIO(image.data)).convert("RGB") for image in question.images] for question in questions]
        messages = [
            [{"role": "user", "content": [*[{"type": "image"}] * len(question.images), {"type": "text", "text": question.text}]}]
            for question in questions
        ]
        texts = self._processor.apply_chat_template(messages, add_generation_prompt=True)
        bare = not texts[0].startswith(self._tokenizer.bos_token or "\0")  # templates may begin the text themselves
        how = {"padding": len(questions) > 1, "add_special_tokens": bare, "return_tensors": "pt"}
        return self._processor(text=texts, images=images if any(images) else None, **how).to(self._model.device)


def _check_layout(folder: Path) -> None:
    """Refuses a model whose class is not of transformers, before its files are taken for damaged: UnifiedReward's first line is one."""
    try:
        (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # `pretrained` says what is wrong
    if not hasattr(need("transformers", "judge", extra="judge"), name):
        raise ServiceError(
            f"{folder} holds a {name}, which transformers does not read (LLaVA's own layout, if it begins with Llava); give a model on "
            "Qwen2.5-VL, such as CodeGoat24/UnifiedReward-qwen-7b, or serve this one with sglang and give NAME@URL"
        )


def _processor(folder: Path) -> Any:
    """The processor of a model. Images are resized by Pillow, and the part for videos is left out: it would need torchvision."""
    _check_layout(folder)
    kind = pretrained("judge", "AutoConfig", folder).model_type
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name

    if kind not in PROCESSOR_MAPPING_NAMES:
        raise ServiceError(f"{folder} holds a model of type {kind!r}, which does not see images; give one such as Qwen2.5-VL")
    whole = processor_class_from_name(PROCESSOR_MAPPING_NAMES[kind])

    def init(self: Any, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **kwargs: Any) -> None:
        whole.__init__(self, image_processor, tokenizer, None, chat_template=chat_template, **kwargs)

    videos = "video_processor" in inspect.signature(whole.__init__).parameters
    cls = type(whole.__name__, (whole,), {"__init__": init}) if videos else whole
    try:
        return cls.from_pretrained(folder, local_files_only=True, backend="pil")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ServiceError(f"{folder} holds no processor that transformers can read ({said}); download the model again") from error
