"""Adapters as runs make them: what is trained, saved, merged and added to a model again."""

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import xomni_jax
from tests.miniature import stage_config
from tests.training.test_stages import metrics, params
from xomni_jax.checkpoint.adapter import load_adapter
from xomni_jax.checkpoint.store import CheckpointError, array_metadata, copy_components
from xomni_jax.cli.main import main
from xomni_jax.core.config import ConfigError
from xomni_jax.sharding.abstract import leaves, path_name
from xomni_jax.training.run import run_stage

TARGETS = "lora.targets=('language/attn/.*_proj','heads/mlp/down_proj')"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_dir):
    """Fine-tuning of adapters of five projections, with an average that is not exported."""
    run_dir = tmp_path_factory.mktemp("adapters") / "run"
    more = ["steps=2", "grid_every=2", "lora.rank=2", "lora.alpha=8", TARGETS, "ema.decay=0.5", "ema.export=False"]
    run_stage(stage_config("sft", run_dir, f"init_from={model_dir}", *more))
    return run_dir


def test_only_adapters_are_trained_and_saved(finished, model_dir):
    with ocp.StandardCheckpointer() as checkpointer:
        stored = list(array_metadata(checkpointer, finished / "checkpoints" / "2" / "state"))
    assert len([name for name in stored if name.startswith("params/")]) == 10 and not any(name.endswith("/kernel") for name in stored)
    adapters, scale = load_adapter(finished / "adapter", model_dir)
    assert scale == 4 and {name for name, _ in leaves(adapters)} == {
        f"transformer/{layer}/lora_{x}" for layer in ("heads/mlp/down_proj", *(f"language/attn/{p}_proj" for p in "kovq")) for x in "ab"
    }
    assert all(np.asarray(x).any() for _, x in leaves(adapters)), "b has moved as well"
    size = sum(path.stat().st_size for path in (finished / "adapter").iterdir())
    assert size < 0.1 * sum(path.stat().st_size for path in (model_dir / "transformer").rglob("*") if path.is_file())


def test_the_merged_model_differs_in_the_adapted_kernels_alone(finished, model_dir):
    before = {path_name(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(xomni_jax.load(model_dir).params("transformer"))}
    after = params(finished, "transformer")
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {f"language/attn/{p}_proj/kernel" for p in "kovq"} | {"heads/mlp/down_proj/kernel"}
    adapters = load_adapter(finished / "adapter", model_dir)[0]["transformer"]["heads"]["mlp"]["down_proj"]
    name = "heads/mlp/down_proj/kernel"
    np.testing.assert_allclose(after[name][0], before[name][0] + 4 * adapters["lora_a"][0] @ adapters["lora_b"][0], rtol=1e-5, atol=1e-6)


def test_base_and_adapters_are_the_merged_model(finished, model_dir, tmp_path, capsys):
    model, merged = xomni_jax.load(model_dir), xomni_jax.load(finished / "model")
    model.adapt(finished / "adapter")
    ids = np.array([[3, 4, 390, 391, 392]])
    for mode in ("text", "image"):
        np.testing.assert_allclose(model.logits(ids, mode), merged.logits(ids, mode), rtol=1e-5, atol=1e-5)
    for name, given in {"a": [f"--model={model_dir}", f"--adapter={finished / 'adapter'}"], "b": [f"--model={finished / 'model'}"]}.items():
        assert main(["generate", 'a red sign that says "A"', "--seed=4", f"--out={tmp_path / name}", *given]) == 0
    first, second = (next((tmp_path / name).glob("*.png")).read_bytes() for name in "ab")
    assert first == second
    assert metrics(finished)[-1]["step"] == 2 and (finished / "images" / "step_000002.png").exists()


def described(directory, **changes):
    """Changes adapter.json."""
    path = directory / "adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda d: (d / "adapter.json").unlink(), "holds no adapter.json; name the folder RUN/adapter"),
        (lambda d: (d / "adapter.safetensors").write_bytes(b"short"), "cannot be read .*; copy it again"),
        (lambda d: (d / "adapter.json").write_text('{"format": "x"}'), "cannot be read .*'scale'.*; copy it again"),
        (lambda d: described(d, format="x 2"), "is a 'x 2', this version reads"),
        (
            lambda d: described(d, base={"transformer": "0"}),
            "was trained on another transformer than that of .*; give the model of its run's init_from",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(finished, model_dir, tmp_path, damage, words, capsys):
    copy = tmp_path / "adapter"
    copy.mkdir()
    for file in (finished / "adapter").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    damage(copy)
    with pytest.raises(CheckpointError, match=words):
        load_adapter(copy, model_dir)
    assert main(["generate", "x", f"--model={model_dir}", f"--adapter={copy}", f"--out={tmp_path / 'images'}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "images").exists()


def test_adapters_of_a_decoder_in_8_bits(model_dir, tmp_path):
    """The MMDiT is frozen in 8 bits under them; the result is merged with the stored float kernels."""
    more = ["steps=2", "lora.rank=2", "mmdit.int8=True", "grid_every=0", "mesh.data=8", "mesh.fsdp=1", "mesh.tensor=1", "batch_size=8"]
    run_stage(stage_config("decoder", tmp_path / "run", f"init_from={model_dir}", *more))
    before, after = xomni_jax.load(model_dir), xomni_jax.load(tmp_path / "run" / "model")
    assert after.config("mmdit") == before.config("mmdit") and not after.config("mmdit").int8
    for name in ("t5", "clip"):
        for a, b in zip(jax.tree.leaves(before.params(name)), jax.tree.leaves(after.params(name)), strict=True):
            np.testing.assert_array_equal(a, b)
    moved = [
        (np.abs(np.asarray(a) - np.asarray(b)).max(), np.abs(np.asarray(a)).max())
        for a, b in zip(jax.tree.leaves(before.params("mmdit")), jax.tree.leaves(after.params("mmdit")), strict=True)
    ]
    assert 0 < max(by for by, _ in moved) and all(by < 0.5 * size for by, size in moved)


def test_a_model_without_the_component_has_nothing_to_adapt(model_dir, tmp_path):
    copy_components(model_dir, tmp_path / "part", ("siglip_vq",))
    with pytest.raises(ConfigError, match="config.lora.rank=2: .* has no transformer to adapt; set it to 0"):
        run_stage(stage_config("pretrain_2", tmp_path / "run", f"init_from={tmp_path / 'part'}", "lora.rank=2"))
    assert not (tmp_path / "run").exists()
