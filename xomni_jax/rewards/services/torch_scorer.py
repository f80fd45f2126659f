"""What scorers share that run a torch model from a local directory. torch and transformers are imported when such a scorer is built."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xomni_jax.rewards.model_files import file_hash, model_directory, model_hash
from xomni_jax.rewards.protocol import Item, Score
from xomni_jax.rewards.scorer import Scorer, ServiceError, need

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_INDEX_BUFFERS = ("position_ids", "relative_position_index")  # in files of older versions; they hold no weights


class TorchScorer(Scorer):
    """A scorer that is one torch model. Its name is also that of the extra with its packages.

    A subclass implements `load` and `score_batch`, and `weights` and `variant` where the defaults do not fit.

    Attributes:
      published: where the model can be had.
      model_hash: identifies the weights, see model_files.py.
    """

    published: str

    @dataclass(frozen=True)
    class Options:
        """The model and where it runs.

        Attributes:
          model: directory with a local copy of the published model; required.
          device: where torch runs, such as cuda:0; without one a GPU when there is one, else the CPU.
          batch: images that the model sees at once; a larger batch is faster on a GPU and takes more memory.
        """

        model: str = ""
        device: str = ""
        batch: int = 16

        def __post_init__(self) -> None:
            if self.batch < 1:
                raise ValueError(f"batch={self.batch} must be at least 1")

    def __init__(self, **options: Any):
        super().__init__(**options)
        self._torch, self._device = torch_and_device(self.name, self.options.device)
        self._folder = model_directory(self.name, "--model", self.options.model, self.published)
        weights = self.weights()
        self.load(weights)
        self.model_hash = model_hash(weights)
        self.version = "/".join((f"{self.name}-{self.model_hash[:12]}", *self.variant()))

    def weights(self) -> Path:
        """The weight file, or the directory whose weight files all belong to the model."""
        return self._folder

    def load(self, weights: Path) -> None:
        """Build the model on `self._device`. ServiceError when the files are not those of the model."""
        raise NotImplementedError

    def variant(self) -> tuple[str, ...]:
        """Options on which the values depend, for `version`."""
        return ()

    def score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Score]:
        """Scores of at most `batch` RGB images, in inference mode."""
        raise NotImplementedError

    def score(self, images: Sequence[np.ndarray], items: Sequence[Item]) -> list[Score]:
        """See Scorer."""
        scores: list[Score] = []
        for n in range(0, len(images), self.options.batch):
            part = slice(n, n + self.options.batch)
            with self._torch.inference_mode():
                scores += self.score_batch([Image.fromarray(i) for i in images[part]], [i["prompt"] for i in items[part]])
        return scores


def torch_and_device(scorer: str, device: str | None) -> tuple[Any, str]:
    """torch, and the device to use. ServiceError when torch or the device is missing."""
    torch = need("torch", scorer, extra=scorer)
    torch.backends.cudnn.allow_tf32 = False  # convolutions in float32 as well, which is not their default on a GPU
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ServiceError(f"scorer {scorer!r}: torch cannot use --device {device} ({_first_line(error)})") from error
    return torch, device


def pretrained(scorer: str, kind: str, folder: Path | None, **options: Any) -> Any:
    """`kind` of transformers, such as a tokenizer, from a local directory. ServiceError when it cannot be read."""
    transformers = need("transformers", scorer, extra=scorer)
    quiet = transformers.utils.logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    cls = getattr(transformers, kind)
    try:
        return cls.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # noqa: BLE001 - readers of damaged files raise anything
        raise ServiceError(
            f"{folder or 'the model'} holds no {kind} that transformers can read ({_first_line(error)}); download the model again"
        ) from error


def pretrained_model(
    scorer: str, kind: str, source: Path, config: Any = None, state: Mapping[str, Any] | None = None, dtype: str = "float32", **more: Any
) -> Any:
    """A model that is ready to run, whose every weight is from `source`: a directory of transformers, or the file that `state` is from.

    ServiceError when weights are missing or left over.
    """
    more |= {"dtype": getattr(need("torch", scorer, extra=scorer), dtype), "output_loading_info": True}
    if state is not None:
        more |= {"config": config, "state_dict": state}
    model, info = pretrained(scorer, kind, source if state is None else None, **more)
    check_complete(source, info["missing_keys"], info["unexpected_keys"])
    return model.eval()


def check_complete(source: Path, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """ServiceError when a checkpoint lacks weights of the model, or has others."""
    unexpected = [key for key in unexpected if not key.endswith(_INDEX_BUFFERS)]
    problems = [
        f"{len(keys)} weights are {what} ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (("missing", list(missing)), ("unexpected", unexpected))
        if keys
    ]
    if problems:
        raise ServiceError(f"{source} is not a complete copy of the published model: {' and '.join(problems)}; download it again")


def torch_state(file: Path) -> dict[str, Any]:
    """The weights of a torch file, read without running what it holds. ServiceError when it is no such file."""
    import torch

    return _state(file, lambda: torch.load(file, map_location="cpu", weights_only=True))


def safetensors_state(file: Path) -> dict[str, Any]:
    """The weights of a safetensors file. ServiceError when it is no such file."""
    from safetensors.torch import load_file

    return _state(file, lambda: load_file(file))


def _state(file: Path, read: Callable[[], Any]) -> dict[str, Any]:
    try:
        return dict(read())
    except Exception as error:  # noqa: BLE001 - readers of damaged files raise anything
        raise ServiceError(f"{file} cannot be read as a file of weights ({_first_line(error)}); download it again") from error


def renamed(key: str, names: Iterable[tuple[str, str]]) -> str:
    """The name of a weight in transformers: the first pattern that its beginning matches is replaced. Unknown names stay."""
    for pattern, name in names:
        if re.match(pattern, key):
            return re.sub(pattern, name, key, count=1)
    return key


def existing_file(folder: Path, name: str) -> Path:
    """The file of this name. ServiceError when the directory has none."""
    if not (folder / name).is_file():
        raise ServiceError(f"{folder} holds no {name}; it has {', '.join(sorted(os.listdir(folder))[:8]) or 'no files'}")
    return folder / name


def published_file(folder: Path, name: str, sha256: str, any_weights: bool) -> Path:
    """The weight file of this name. ServiceError when it is missing, or is not the published one and `any_weights` does not allow that."""
    file = existing_file(folder, name)
    if not any_weights and (found := file_hash(file)) != sha256:
        raise ServiceError(
            f"{file} is not the published file: its sha256 begins with {found[:12]}, not {sha256[:12]}; download it again, or allow it "
            "with --any-weights"
        )
    return file


def normalised(torch: Any, images: Sequence[Image.Image], mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Any:
    """float32 [B, 3, Y, X] of RGB images of one size, with the mean and deviation of values in [0, 1]."""
    pixels_BYXC = np.stack([np.asarray(image.convert("RGB"), np.float32) for image in images]) / 255
    pixels_BYXC = (pixels_BYXC - np.float32(mean)) / np.float32(std)
    return torch.from_numpy(np.ascontiguousarray(pixels_BYXC.transpose(0, 3, 1, 2)))


def centre_square(image: Image.Image, size: int) -> Image.Image:
    """The middle of the image, its short side resized to `size`: torchvision's Resize and CenterCrop on a PIL image."""
    width, height = (max(size, int(size * side / min(image.size))) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def unit(features: Any) -> Any:
    """Features scaled to length 1 along the last axis."""
    return features / features.norm(dim=-1, keepdim=True)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
