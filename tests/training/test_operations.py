"""What an operator reads of a run: placement of weights, counted operations, goodput, compilations after warm-up, profiles, retention."""

import json
import time
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.training.test_loop import counting, go, lines, run, saved
from xomni_jax.checkpoint.run_checkpoints import RunCheckpoints
from xomni_jax.core.config import ConfigError
from xomni_jax.core.preemption import StopSignal
from xomni_jax.sharding.mesh import make_mesh
from xomni_jax.training import loop
from xomni_jax.training.operations import CompileLog, FlopCount, Meter, placement, profile_range


def weights(mesh, **specs):
    """Arrays of 64 x 64 float32 with a spec each."""
    return {name: {"kernel": jax.device_put(jnp.ones((64, 64)), NamedSharding(mesh, PartitionSpec(*spec)))} for name, spec in specs.items()}


def test_a_line_for_every_large_weight():
    mesh = make_mesh(dict(fsdp=4, tensor=2))
    told = placement(weights(mesh, up=("fsdp", "tensor"), down=(None, "fsdp")), mesh)
    assert told == [
        "  down/kernel 64x64 float32 P(None, 'fsdp') 4.1 KB a device",
        "  up/kernel 64x64 float32 P('fsdp', 'tensor') 2.05 KB a device",
        "  in all 2 arrays, 32.8 KB, 6.14 KB a device",
    ]


def test_weights_that_lie_whole_by_accident_are_refused():
    """One kernel of 40 is 2.5 %, one of 60 less than 2 %; a mesh without fsdp has nothing to split them over."""
    mesh = make_mesh(dict(fsdp=8))
    many = {f"k{i}": ("fsdp",) for i in range(39)}
    with pytest.raises(
        ConfigError, match=r"2\.5% of the parameters' bytes are replicated on every device, first lost/kernel\(64, 64\) .*fsdp=8"
    ):
        placement(weights(mesh, lost=(), **many), mesh)
    placement(weights(mesh, lost=(), **many, **{f"m{i}": ("fsdp",) for i in range(20)}), mesh)
    flat = make_mesh(dict(data=8))
    placement(weights(flat, lost=()), flat)


def test_what_is_whole_by_design_is_no_accident():
    mesh = make_mesh(dict(fsdp=8))
    whole = jax.device_put(jnp.ones((64, 64)), NamedSharding(mesh, PartitionSpec()))
    placement({"norm": {"scale": whole}, "codebook": whole, "time_embed": {"in": {"kernel": whole}}}, mesh)
    with pytest.raises(ConfigError, match="first time_embed/out/kernel"):
        placement({"time_embed": {"out": {"kernel": whole}}}, mesh)


def test_counts_add_up_over_calls_and_become_rates(monkeypatch):
    flops = FlopCount()
    fn = flops(jax.jit(lambda s: s @ s))
    for _ in range(3):
        fn(jnp.ones((4, 4)))
    assert flops.total == 3 * 128
    device = types.SimpleNamespace(
        device_kind="TPU v6 lite", memory_stats=lambda: {"bytes_in_use": 3e9, "peak_bytes_in_use": 5e9, "other": 1}
    )
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    meter = Meter(lambda: 918e12)
    with meter.aside():
        pass
    got = meter.scalars(seconds=2.0, compiling=0.0)
    assert got["perf/mfu"] == pytest.approx(0.25) and got["perf/tflops_device"] == pytest.approx(229.5)
    assert got["memory/in_use_gb"] == 3 and got["memory/peak_gb"] == 5 and "memory/limit_gb" not in got
    assert 0 <= got["perf/goodput"] <= 1
    assert "perf/mfu" not in meter.scalars(1.0, 0.0)  # nothing was counted since


def test_compilations_are_heard():
    with CompileLog() as log:
        fn = jax.jit(lambda x: x * 3 + 1)
        fn(jnp.ones(17)), fn(jnp.ones(17))
        assert any("lambda" in name for name in log.since()) and log.seconds > 0
        fn(jnp.ones(17))
        assert log.since() == []
        fn(jnp.ones(18))
        assert any("lambda" in name for name in log.since())


def test_a_run_that_compiles_again_says_so(tmp_path, capsys):
    """A shape of its own in the first steps is warm-up; one in the sixth is news."""
    fn = jax.jit(lambda x: x.sum() * 5)
    go(run(tmp_path, grid_every=0), counting(lambda n: {"other": float(fn(jnp.ones(2 + (n == 5))))}))
    told = capsys.readouterr()
    news = [line for line in (told.out + told.err).splitlines() if "compiled again" in line]
    assert len(news) == 1 and "step 6 compiled again" in news[0] and "lambda" in news[0]


def test_a_profile_of_some_steps(tmp_path, capsys):
    config = run(tmp_path, grid_every=0)
    with StopSignal() as stop:
        loop.train(config, counting(), stop, profile=(3, 4))
    assert f"profile of steps 3-4 in {tmp_path / 'run' / 'profile'}" in capsys.readouterr().out
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("text", ["3", "3-", "-8", "8-3", "0-2", "a-b"])
def test_steps_to_profile_that_are_none(text):
    with pytest.raises(ConfigError, match=f"--profile-steps {text}: give two step numbers, such as 3-8"):
        profile_range(text)
    assert profile_range("3-8") == (3, 8)


def test_saves_by_time_and_what_is_kept(tmp_path, monkeypatch):
    """No step is due by its number, but each takes half a minute; the fifth stays for good."""
    clock = iter(range(0, 10**6, 30))
    # A clock of the loop alone: threads of Orbax and of other tests read the time as well.
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=lambda: float(next(clock)), perf_counter=time.perf_counter))
    go(run(tmp_path, grid_every=0, log_every=1, save_every=100, save_minutes=1.0, keep=2, keep_every=2), counting())
    assert saved(tmp_path)[-1] == 7 and 2 < len(saved(tmp_path)) < 7
    steps = tmp_path / "kept"
    checkpoints = RunCheckpoints(steps, keep=1, keep_every=4)
    for step in range(1, 8):
        checkpoints.save(step, {"a": jnp.ones(2)}, {}, wait=True)
    assert list(checkpoints.manager.all_steps()) == [4, 7]
    checkpoints.close()


def test_metrics_of_a_run(tmp_path):
    go(run(tmp_path, grid_every=0), counting())
    text = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= line["perf/goodput"] <= 1 and line["perf/data_s"] == 0.5 for line in text) and len(lines(tmp_path)) == 4
