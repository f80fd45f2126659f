"""The shares of a device's peak: what is counted, and names of devices."""

import jax
import numpy as np
import pytest

from tests.benchmarks import device


def test_bytes_and_operations_are_those_of_the_formula():
    """6 N D for the products with weights, and the attention's own; weights and half of the cache for every code."""
    size = device.SIZES["tiny"]
    c = size.config
    draw, read = device.drawing(size)
    assert np.shape(draw()) == (size.images, 1, size.codes)
    layer = 2 * c.d_model * c.head_dim * (c.n_heads + c.n_kv_heads) + 3 * c.d_model * c.mlp_dim
    biases, norms = c.head_dim * (c.n_heads + 2 * c.n_kv_heads), 2 * c.d_model
    weights = c.n_layers * (layer + biases + norms) + c.d_model * (c.mm_vocab_size + 2)
    cache = 2 * c.n_layers * c.n_kv_heads * c.head_dim * size.images * (32 + (size.codes - 1) / 2)
    assert read == size.codes * 4 * (weights + cache)
    step, flops = device.training(size)
    losses = [float(step()) for _ in range(4)]
    assert losses[-1] < losses[0]
    products = c.n_layers * layer * size.length + c.d_model * c.image_vocab_size * (size.length - 1)
    attention = 2 * c.n_layers * c.n_heads * c.head_dim * size.length**2
    assert flops == pytest.approx(6 * size.rows * (products + attention), rel=1e-6)


def test_devices_that_are_known():
    assert device.peaks("NVIDIA H200") == (989e12, 4.8e12)
    assert device.peaks("NVIDIA A100-SXM4-80GB")[1] > device.peaks("NVIDIA A100-PCIE-40GB")[1]
    assert device.peaks("TPU v5 lite") == (197e12, 819e9)
    assert device.peaks(jax.devices()[0].device_kind) is None


def test_what_is_printed(monkeypatch):
    monkeypatch.setattr(device, "peaks", lambda kind: (1e15, 1e15))
    report = device.run("tiny", 1, 0.1)
    assert "TFLOP/s" in report.text and report.data["draw_s"] > 0 and report.data["train_flops"] > 0
