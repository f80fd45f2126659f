"""A vision-language model in this process, such as Qwen2.5-VL: any directory that transformers reads. Needs torch."""

from __future__ import annotations

import io
import threading
from pathlib import Path

from PIL import Image

from xomni_jax.checkpoint.store import checkpoint_hash
from xomni_jax.evaluation.judges.preparation import EncodedImage
from xomni_jax.evaluation.judges.replies import Completion, completion
from xomni_jax.evaluation.suite import SuiteError


class LocalModel:
    """See `chat.ChatModel`. It runs on a GPU if torch finds one, and answers one request at a time.

    Raises:
      SuiteError: torch is missing, or the directory holds no such model.
    """

    def __init__(self, folder: Path):
        try:
            import torch
            from transformers import AutoModelForImageTextToText, AutoProcessor

            self._processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
            self._model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, dtype="auto")
        except ImportError as error:
            raise SuiteError(f"{folder} is read with torch, and Qwen2.5-VL with torchvision: pip install 'xomni_jax[judge]'") from error
        except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise SuiteError(f"{folder} holds no model for images and text that transformers reads: {said}") from error
        self._torch, self._lock = torch, threading.Lock()
        self._model = self._model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self.name = folder.resolve().name
        self.settings = {"version": checkpoint_hash(folder)[:16], "dtype": str(self._model.dtype).removeprefix("torch.")}

    def complete(self, text: str, max_tokens: int, image: EncodedImage | None = None) -> Completion:
        """See ChatModel."""
        shown = [{"type": "image", "image": Image.open(io.BytesIO(image.data)).convert("RGB")}] if image else []
        messages = [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]
        with self._lock, self._torch.inference_mode():
            inputs = self._processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            ).to(self._model.device)
            ids = self._model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        ends = self._model.generation_config.eos_token_id
        cut = len(ids) == max_tokens and ids[-1].item() not in (ends if isinstance(ends, list) else [ends])
        return completion(self._processor.decode(ids, skip_special_tokens=True), cut)

    def close(self) -> None:
        """Frees the model."""
        del self._model
