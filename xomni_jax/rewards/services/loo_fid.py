"""What each image adds to the likeness of all images to real ones: leave-one-out FID (arXiv 2603.23086)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol
from zipfile import BadZipFile

import numpy as np
from PIL import Image

from xomni_jax.core.registry import Registry
from xomni_jax.rewards.model_files import model_directory, model_hash
from xomni_jax.rewards.protocol import Item, Score
from xomni_jax.rewards.scorer import Scorer, ServiceError, need
from xomni_jax.rewards.services.clip_towers import ClipTowers
from xomni_jax.rewards.services.efficientnet import EfficientNetLite0
from xomni_jax.rewards.services.quality import read_references
from xomni_jax.rewards.services.torch_scorer import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    existing_file,
    normalised,
    pretrained,
    pretrained_model,
    torch_and_device,
    torch_state,
)

_INCEPTION = "inception_v3_google-0cc3c7bd.pth"  # as torchvision names it
_SIDE = 299  # pixels of the square that Inception sees
_EPS = 1e-12  # below the square root of a variance
Features = Callable[[Sequence[Image.Image]], np.ndarray]  # RGB images -> [N, D]
FEATURES = Registry("features", {name: f"{__name__}:{name}" for name in ("inception", "clip", "efficientnet")})


class FeatureOptions(Protocol):
    """What features are made from: options of `LooFidScorer`."""

    model: str
    device: str


class LeaveOneOutFID:
    """How much nearer each sample brings the moments of all samples to those of real data. All in float64.

    With `decay`, the moments of all samples are an exponential moving average over the calls, which a call updates with its samples:
    average = decay * average + (1 - decay) * moments. A reward compares the update by all samples with the update by all but one.

    Args:
      mean_D, covariance_DD: of the features of real images.
      full: whole covariances, one eigendecomposition [D, D] per sample; else variances alone, as in the paper's code.
      decay: None compares the samples of a call alone.
      debias: divide the average, which then starts from zero, by 1 - decay^calls.
      start: moments (mean, covariance) with which the average starts; without them, those of the first call.
    """

    def __init__(
        self,
        mean_D: np.ndarray,
        covariance_DD: np.ndarray,
        full: bool = False,
        decay: float | None = None,
        debias: bool = False,
        start: tuple[np.ndarray, np.ndarray] | None = None,
    ):
        self._mean, self._full, self._decay, self._debias = mean_D, full, decay, debias
        if full:
            values, vectors = np.linalg.eigh(covariance_DD)
            self._root_DD, self._trace = (vectors * np.sqrt(values.clip(0))) @ vectors.T, covariance_DD.trace()
        else:
            self._std_D = np.sqrt(covariance_DD.diagonal())
        self._average, self._calls = None, 0
        if start is not None:
            mean, covariance = start
            self._average = mean, self._square(mean) + (covariance if full else covariance.diagonal())
            if debias:
                self._average, self._calls = tuple((1 - decay) * m for m in self._average), 1

    def rewards(self, features_ND: np.ndarray) -> tuple[np.ndarray, float]:
        """(reward of each of at least two samples [N], FID after the update). A positive reward means that the sample helps."""
        x_ND = features_ND.astype(np.float64)
        count, mean, square = len(x_ND), x_ND.mean(0), x_ND.T @ x_ND / len(x_ND) if self._full else (x_ND**2).mean(0)
        fid = self.fid(*self._updated(mean, square))
        rewards = []
        for x_D in x_ND:
            without = (count * mean - x_D) / (count - 1), (count * square - self._square(x_D)) / (count - 1)
            rewards.append(self.fid(*self._updated(*without)) - fid)
        self._average, self._calls = self._updated(mean, square, raw=True), self._calls + 1
        return np.array(rewards), fid

    def fid(self, mean_D: np.ndarray, square: np.ndarray) -> float:
        """Fréchet distance between the real features and those with these first and second moments."""
        distance = float(np.sum((self._mean - mean_D) ** 2))
        if not self._full:
            return distance + float(np.sum((self._std_D - np.sqrt(np.maximum(square - mean_D**2, 0) + _EPS)) ** 2))
        covariance_DD = square - np.outer(mean_D, mean_D)
        values_D = np.linalg.eigvalsh(self._root_DD @ covariance_DD @ self._root_DD)
        return distance + float(self._trace + covariance_DD.trace() - 2 * np.sqrt(values_D.clip(0)).sum())

    def state(self) -> dict[str, np.ndarray]:
        """The average, for `restore`."""
        return {} if self._average is None else {"mean": self._average[0], "square": self._average[1], "calls": np.array(self._calls)}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Go on from a `state`. ValueError for one of other features."""
        if state and (state["mean"].shape, state["square"].shape) != (self._mean.shape, self._square(self._mean).shape):
            raise ValueError(f"its mean has the shape {list(state['mean'].shape)}, these features {list(self._mean.shape)}")
        self._average = (state["mean"], state["square"]) if state else None
        self._calls = int(state["calls"]) if state else 0

    def _square(self, x_D: np.ndarray) -> np.ndarray:
        return np.outer(x_D, x_D) if self._full else x_D**2

    def _updated(self, mean_D: np.ndarray, square: np.ndarray, raw: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The average after an update; `raw` is what is kept for the next one."""
        if self._decay is None:
            return mean_D, square
        now = (mean_D, square)
        before = self._average or ((np.zeros_like(mean_D), np.zeros_like(square)) if self._debias else now)
        scale = 1.0 if raw or not self._debias else 1 - self._decay ** (self._calls + 1)
        mean, square = ((self._decay * old + (1 - self._decay) * new) / scale for old, new in zip(before, now))
        return mean, square


class LooFidScorer(Scorer):
    """How much the image brings all images of its request nearer to real ones, in units of FID; positive when it helps.

    Applies to every item; the prompt is not read. All images of a request are compared at once, so that it must hold a whole batch, and a
    moving average remembers the earlier requests. Detail: fid, of all images.
    """

    name = "loo_fid"
    scope = "set"
    scale = "change of FID by the image, about 0 on average; its size falls with the number of images"

    @dataclass(frozen=True)
    class Options:
        """What images are compared with, in which features, and how the service remembers.

        Attributes:
          references: folder with PNG, JPEG or WebP files of real images.
          statistics: npz file with their mean `mu` and covariance `sigma` in the same features; when it does not exist, it is made from
            --references, which is not needed afterwards.
          features: inception (2,048 numbers of torchvision's Inception-v3, as published), clip (image features of any CLIP),
            efficientnet (384 numbers of the network of scorer `quality`, without torch), or path/to/file.py:function, which makes
            your own: these options -> (RGB images -> [N, D]).
          model: directory with inception_v3_google-0cc3c7bd.pth, or of the CLIP, or what your function reads.
          covariance: diagonal, as published, or full, which takes seconds per image with 2,048 features.
          decay: of the moving average over requests; 0 compares the images of a request alone.
          debias: start the average from zero and divide it by its weight.
          start: npz file as --statistics, of images of the model before training, with which the average starts; without one it starts
            with the first request.
          device: where torch runs, such as cuda:0; without one a GPU when there is one, else the CPU.
          batch: images that the network sees at once.
        """

        references: str = ""
        statistics: str = ""
        features: str = "inception"
        model: str = ""
        covariance: Literal["diagonal", "full"] = "diagonal"
        decay: float = 0.5
        debias: bool = False
        start: str = ""
        device: str = ""
        batch: int = 32

        def __post_init__(self) -> None:
            if not 0 <= self.decay < 1:
                raise ValueError(f"decay={self.decay} must be at least 0 and less than 1")
            if self.batch < 1:
                raise ValueError(f"batch={self.batch} must be at least 1")
            if not (self.references or self.statistics):
                raise ValueError("give the real images as references=FOLDER, or as statistics=FILE.npz")

    def __init__(self, **options: Any):
        super().__init__(**options)
        o = self.options
        self._features: Features = FEATURES.get(o.features)(o)
        self.model_hash = model_hash(o.model) if o.model else ""
        mean, covariance = self._real()
        start = read_statistics(Path(o.start), len(mean)) if o.start else None
        self._fid = LeaveOneOutFID(mean, covariance, o.covariance == "full", o.decay or None, o.debias, start)
        weights, real = f"-{self.model_hash[:12]}" * bool(self.model_hash), hashlib.sha256(mean.tobytes() + covariance.tobytes())
        self.version = (
            f"loo-fid/{Path(o.features).name}{weights}/real-{real.hexdigest()[:8]}/{o.covariance}/decay-{o.decay:g}" + "/debias" * o.debias
        )

    def score(self, images: Sequence[np.ndarray], items: Sequence[Item]) -> list[Score]:
        """See Scorer. Every image of a request counts; a single one cannot be left out."""
        if len(images) < 2:
            return [Score(None, "leave-one-out FID needs at least two images in one request")] * len(images)
        rewards_N, fid = self._fid.rewards(np.concatenate(list(self._batches(map(Image.fromarray, images)))))
        return [Score(reward, None, {"fid": fid}) for reward in rewards_N.tolist()]

    def state(self) -> dict[str, np.ndarray]:
        """The moving average, for `restore`."""
        return self._fid.state()

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Go on from a `state`. ValueError for one of other features."""
        self._fid.restore(state)

    def _batches(self, images: Iterable[Image.Image]) -> Iterable[np.ndarray]:
        images = iter(images)
        while batch := list(islice(images, self.options.batch)):
            yield self._features(batch)

    def _real(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of the real images' features."""
        file = Path(self.options.statistics) if self.options.statistics else None
        if file is None or not file.exists():
            if not self.options.references:
                raise ServiceError(f"--statistics {file} does not exist; give --references FOLDER, of which it is made")
            references = read_references(Path(self.options.references), 2)
            features_ND = np.concatenate(list(self._batches(map(Image.fromarray, references)))).astype(np.float64)
            mean, covariance = features_ND.mean(0), np.cov(features_ND, rowvar=False)
            if file is None:
                return mean, covariance
            write_statistics(file, mean, covariance)
        return read_statistics(file, self._features([Image.new("RGB", (64, 64))]).shape[1])


def efficientnet(options: FeatureOptions) -> Features:
    """Features [N, 384] of the network of scorer `quality`."""
    network = EfficientNetLite0()
    return lambda images: np.stack([network(np.asarray(image)) for image in images])


def inception(options: FeatureOptions) -> Features:
    """Pooled features [N, 2048] of torchvision's Inception-v3, of whole images resized to a square."""
    torch, device = torch_and_device("loo_fid", options.device)
    folder = model_directory("loo_fid", "--model", options.model, f"torchvision's Inception-v3 ({_INCEPTION})")
    models = need("torchvision", "loo_fid", extra="loo_fid").models
    model = models.inception_v3(weights=None, transform_input=True, init_weights=False)
    file = existing_file(folder, _INCEPTION)
    try:
        model.load_state_dict(torch_state(file))
    except RuntimeError as error:
        raise ServiceError(f"{file} does not hold the weights of torchvision's Inception-v3; download it again") from error
    model.fc = torch.nn.Identity()
    model.eval().to(device)

    def features(images: Sequence[Image.Image]) -> np.ndarray:
        squares = [image.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR) for image in images]
        with torch.inference_mode():
            return model(normalised(torch, squares, IMAGENET_MEAN, IMAGENET_STD).to(device)).cpu().numpy()

    return features


def clip(options: FeatureOptions) -> Features:
    """Unit image features of a CLIP."""
    torch, device = torch_and_device("loo_fid", options.device)
    folder = model_directory("loo_fid", "--model", options.model, "a CLIP")
    towers = ClipTowers(pretrained_model("loo_fid", "CLIPModel", folder), None, device)
    processor = pretrained("loo_fid", "CLIPImageProcessorPil", folder)

    def features(images: Sequence[Image.Image]) -> np.ndarray:
        with torch.inference_mode():
            return towers.image_features(processor(list(images), return_tensors="pt").pixel_values).cpu().numpy()

    return features


def read_statistics(file: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(mean, covariance) of `count` features from an npz file with `mu` and `sigma`. ServiceError when it holds anything else."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            mean, covariance = (np.asarray(arrays[name], np.float64) for name in ("mu", "sigma"))
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise ServiceError(f"{file} cannot be read as an npz file with `mu` and `sigma` ({error})") from error
    if mean.shape != (count,) or covariance.shape != (count, count):
        raise ServiceError(f"{file} has a `mu` of {list(mean.shape)} and a `sigma` of {list(covariance.shape)}; these features are {count}")
    return mean, covariance


def write_statistics(file: Path, mean: np.ndarray, covariance: np.ndarray) -> None:
    """What `read_statistics` reads; whole or not at all. ServiceError when it cannot be written."""
    part = file.with_name(f"{file.name}.part.npz")
    try:
        np.savez(part, mu=mean, sigma=covariance)
        part.replace(file)
    except OSError as error:
        raise ServiceError(f"--statistics {file} cannot be written ({error.strerror}); choose a file in an existing folder") from error
