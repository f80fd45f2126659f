"""`xomni bench convert` at a size that takes seconds: everything it says, and that memory does not grow with the checkpoint."""

import dataclasses
import json
import os

import pytest

from tests.benchmarks import convert
from tests.benchmarks.synthetic import BF16, Parts, released_widths, size
from tests.benchmarks.timing import BenchError
from xomni_jax.cli.main import main
from xomni_jax.models.mmdit import MMDiTConfig
from xomni_jax.models.siglip_vq import SigLIPVQConfig
from xomni_jax.models.transformer import PRESETS

SMALL = Parts(
    dataclasses.replace(PRESETS["tiny"], d_model=512, mlp_dim=1536, n_language_layers=40, vocab_size=999),
    SigLIPVQConfig(width=96, layers=2, heads=16, mlp=40, patch=4, pos_grid=5, codebook_size=512, code_width=10),
    MMDiTConfig(
        in_channels=12, d_model=24, n_heads=2, axes_dims=(2, 4, 6), n_double=2, n_single=3, text_dim=14, pooled_dim=18, semantic_dim=96
    ),
)  # fmt: skip


def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    report = convert.run(0.01, str(tmp_path), 1, 1.0, SMALL)
    data = json.loads(json.dumps(report.data))
    assert data["bytes"] > 210e6 and data["largest_bytes"] == 512 * 1536 * 2 and data["limit_bytes"] == 2 * 512 * 1536 * 2 + 400_000_000
    # The checkpoint has 220 MB, no tensor more than 2.
    assert data["peak_bytes"][convert.CONVERSION] - data["runs"][convert.CONVERSION][0]["start"] < 150e6
    assert data["parameters_compared"] == 42 + 36 + 67 and len(data["copy_seconds"]) == len(data["hash_seconds"]) == 1
    assert all(len(runs) == 1 and not runs[0]["said"] for runs in data["runs"].values())
    assert f"conversion at {data['ratio']:.2f} of a plain copy, 0.7 of" in report.text
    assert "all 145 parameters equal the files' tensors" in report.text
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("gigabytes", [4, 6])
def test_the_default_has_the_released_widths_and_the_asked_size(gigabytes):
    parts = released_widths(gigabytes * 10**9)
    total = size("transformer", parts.transformer, BF16) + size("siglip_vq", parts.siglip_vq, BF16) * 2 + size("mmdit", parts.mmdit, BF16)
    assert gigabytes * 1e9 <= total < gigabytes * 1e9 + 1.1e9
    assert (parts.transformer.d_model, parts.siglip_vq.width, parts.mmdit.d_model) == (3584, 1536, 3072)


def test_a_wrong_conversion_is_not_reported(tmp_path, monkeypatch):
    action = convert.ACTIONS[convert.CONVERSION].replace("sys.argv[2],", "sys.argv[2], 'bfloat16',")
    monkeypatch.setitem(convert.ACTIONS, convert.CONVERSION, action)
    with pytest.raises(BenchError, match="siglip_vq/codebook is not what the checkpoint holds"):
        convert.run(
            0.01, str(tmp_path), 1, 1.0, dataclasses.replace(SMALL, transformer=dataclasses.replace(SMALL.transformer, n_language_layers=1))
        )
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "line, words",
    [
        ("convert --gb 0", "--gb 0 must be above 0"),
        ("convert --dir /no/such/folder", "--dir /no/such/folder: there is no such folder; make it first"),
        ("convert --gb 99999999", "GB are free; give another --dir"),
        ("grpo --gb 4", "--gb belongs to bench convert; bench grpo does not take it"),
    ],
)
def test_errors_are_one_sentence(line, words, capsys, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "unused")
    monkeypatch.setattr("sys.argv", ["xomni"])
    assert main(["bench", *line.split()]) == 2
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1
