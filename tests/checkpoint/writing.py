"""The writers of tensor files for arrays that are already there."""

import numpy as np

from xomni_jax.checkpoint import safetensors_file, torch_file
from xomni_jax.checkpoint.tensor_file import LazyTensor


def lazy(tensors):
    """{key: array or LazyTensor} as LazyTensors."""
    out = {}
    for key, x in tensors.items():
        make = x.make if isinstance(x, LazyTensor) else lambda x=x: x
        out[key] = LazyTensor(np.dtype(x.dtype), tuple(x.shape), make)
    return out


def write_safetensors(folder, tensors, *args, **kwargs):
    """`safetensors_file.write_safetensors`."""
    return safetensors_file.write_safetensors(folder, lazy(tensors), *args, **kwargs)


def write_torch_file(path, tensors):
    """`torch_file.write_torch_file`."""
    torch_file.write_torch_file(path, lazy(tensors))
