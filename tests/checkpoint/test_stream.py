"""Parameters put together in parts, and written by parts: on one host, by several, in little memory."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from tests.miniature import ROOT
from tests.name_tables import plan, to_params, to_tensors
from xomni_jax.checkpoint.conversion import (
    CONV,
    TRANSPOSE,
    ConversionError,
    Ignored,
    Init,
    NameTable,
    Rule,
    bias_axes,
    flatten,
    in_axes,
    out_axes,
    problems,
)
from xomni_jax.checkpoint.names import initializers
from xomni_jax.checkpoint.orbax_reader import OrbaxReader
from xomni_jax.checkpoint.param_reader import ParamReader, TensorFiles, blocks_of, copy_strided, not_finite, param_readers
from xomni_jax.checkpoint.stream import chunk_shape, save_params

FITS = [
    (TRANSPOSE, (6, 35)),
    (out_axes(2, 3), (6, 35)),
    (in_axes(5, 7), (6, 35)),
    (out_axes(3, 2, 1), (6, 35)),
    (bias_axes(2, 3), (6,)),
    (CONV, (6, 5, 3, 2)),
]


class Memory:
    """A `TensorFile` of arrays."""

    path, tied, others = "here", {}, ()

    def __init__(self, tensors):
        self.tensors, self.released = tensors, []
        self.infos = {k: SimpleNamespace(file="here", key=k, dtype=v.dtype, shape=v.shape, nbytes=v.nbytes) for k, v in tensors.items()}

    def read(self, key):
        return self.tensors[key]

    def release(self, key):
        self.released.append(key)


def small(rng):
    """Tensors, table and shapes with every kind of rule: stacked, joined, plain, new."""
    tensors = {f"l.{i}.w": rng.normal(size=(6, 10)).astype(ml_dtypes.bfloat16) for i in range(3)} | {
        "e": rng.normal(size=(7, 5)).astype(np.float32)
    }
    tensors |= {f"l.{i}.{n}": rng.normal(size=(4, 9)).astype(np.float32) for i in range(3) for n in "qkv"}
    rules = [Rule(f"l.{i}.w", "layers/w/kernel", out_axes(2, 3), i) for i in range(3)] + [Rule("e", "embed/table", TRANSPOSE)]
    rules += [Rule(f"l.{i}.{n}", "layers/qkv/kernel", out_axes(2, 2), i, (1, p)) for i in range(3) for p, n in enumerate("qkv")]
    table = NameTable(
        rules,
        [Ignored("x.*", "unused")],
        [Init("new/kernel", initializers.normal(1.0)), Init("stack/kernel", initializers.normal(1.0), stacked=True)],
    )
    shapes = {
        "layers/w/kernel": (3, 10, 2, 3),
        "embed/table": (5, 7),
        "layers/qkv/kernel": (3, 9, 3, 2, 2),
        "new/kernel": (5, 3),
        "stack/kernel": (4, 3, 5),
    }
    return tensors, table, shapes


# ---- the plan ----
def test_the_plan_of_joined_and_new_parameters(rng):
    tensors, table, shapes = small(rng)
    assert plan(tensors | {"x1": np.zeros(2)}, table, shapes) == list(table.rules)
    params = to_params(tensors, NameTable(table.rules), {k: v for k, v in shapes.items() if k.startswith(("layers", "embed"))})
    for key, value in to_tensors(params, table).items():
        np.testing.assert_array_equal(value, tensors[key])


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t, r, s: t.pop("l.1.k"), "l.1.k: missing from the checkpoint"),
        (lambda t, r, s: t.update(y=np.zeros(2)), "y: in the checkpoint, no rule takes it"),
        (lambda t, r, s: r.remove(r[5]), "l.0.k: in the checkpoint, no rule takes it"),
        (lambda t, r, s: r.append(r[0]), "l.0.w: two rules"),
        (lambda t, r, s: s.update(other=(2,)), "other: in the model, no rule fills it"),
        (lambda t, r, s: s.pop("embed/table"), "embed/table: in the table, not in the model"),
        (
            lambda t, r, s: s.update({"layers/w/kernel": (4, 10, 2, 3)}),
            r"layers/w/kernel: filled by layers \[0, 1, 2\], expected \[0, 1, 2, 3\]",
        ),
        (lambda t, r, s: s.update({"embed/table": (7, 5)}), r"e: shape \(5, 7\) after \[O,I\] -> \[I,O\], embed/table wants \(7, 5\)"),
        (lambda t, r, s: t.update({"l.2.w": np.zeros((5, 10))}), r"l.2.w: shape \(5, 10\) cannot be turned \[O,I\] -> \[I,2,3\]"),
        (lambda t, r, s: t.update({"l.2.q": np.zeros((4, 8))}), r"l.2.q: shape \(8, 2, 2\) after .*, layers/qkv/kernel wants \(9, 2, 2\)"),
    ],
)
def test_each_problem_is_named(change, words, rng):
    tensors, table, shapes = small(rng)
    rules = list(table.rules)
    change(tensors, rules, shapes)
    with pytest.raises(ConversionError, match=words):
        plan(tensors, NameTable(rules, table.ignored, table.inits), shapes)


def test_a_target_made_twice(rng):
    tensors, table, shapes = small(rng)
    twice = NameTable(table.rules, table.ignored, [*table.inits, Init("embed/table", initializers.constant(0))])
    assert "embed/table: made twice" in problems(tensors, twice, shapes)


def test_planning_touches_no_values():
    """Shapes of the size of a model are checked without memory for them."""
    shape = (152_064 * 64, 3584)
    info = SimpleNamespace(shape=shape, dtype=np.dtype(np.float32), nbytes=0)
    table = NameTable([Rule("w", "k", out_axes(152_064, 64))])
    assert problems({"w": info}, table, {"k": (3584, 152_064, 64)}) == []


# ---- any part of a parameter ----
@pytest.mark.parametrize("fit, shape", FITS, ids=lambda x: getattr(x, "name", ""))
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_copies_are_exact(fit, shape, dtype, rng):
    value = fit.to_jax(rng.normal(size=shape).astype(dtype))
    for kind in (dtype, np.float32):
        out = np.empty(value.shape, kind)
        copy_strided(out, value)
        np.testing.assert_array_equal(out, np.ascontiguousarray(value).astype(kind))


def test_large_copies_cross_tiles(rng):
    value = rng.integers(0, 2**16, (70, 9000), np.uint16).T
    out = np.empty(value.shape, np.uint16)
    copy_strided(out, value)
    np.testing.assert_array_equal(out, value)


def test_any_rectangle_is_part_of_the_whole(rng):
    tensors, table, shapes = small(rng)
    targets, wrong = param_readers(table, shapes, TensorFiles().add(Memory(tensors)), np.dtype(np.float32))
    assert wrong == []
    for target in targets:
        whole = target.read()
        assert whole.shape == target.shape and whole.dtype == np.float32
        for _ in range(20):
            index = tuple(slice(*sorted(rng.integers(0, n + 1, 2))) for n in target.shape)
            np.testing.assert_array_equal(target.read(index), whole[index])


@pytest.mark.parametrize("limit", [1, 40, 100, 10**6])
def test_blocks_cover_a_parameter_once_in_the_order_of_the_file(limit, rng):
    tensors, table, shapes = small(rng)
    targets, _ = param_readers(table, shapes, TensorFiles().add(Memory(tensors)), None)
    for target in targets:
        seen = np.zeros(target.shape, int)
        for index in blocks_of(target, tuple(min(2, n) for n in target.shape), limit):
            seen[index] += 1
        assert (seen == 1).all()
    embed = next(t for t in targets if t.path == "embed/table")  # transposed: its last axis is the file's first
    assert [i[1] for i in blocks_of(embed, (1, 2), 40)] == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 7)]


@pytest.mark.parametrize(
    "shape, itemsize, stacked, limit, chunk",
    [
        ((36, 3584, 18944), 2, True, 16 * 2**20, (1, 1792, 2368)),
        ((152064, 3584), 2, False, 16 * 2**20, (2376, 1792)),
        ((28, 3584), 2, True, 16 * 2**20, (28, 3584)),
        ((5, 7, 11), 4, True, 200, (1, 7, 1)),
        ((), 4, False, 8, ()),
        ((0, 3), 4, True, 8, (1, 1)),
    ],
)
def test_pieces_are_even_and_bounded(shape, itemsize, stacked, limit, chunk):
    made = chunk_shape(shape, itemsize, stacked, limit)
    assert made == chunk and np.prod(made, dtype=int) * itemsize <= limit


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_values_that_are_no_numbers(dtype, rng):
    x = rng.normal(size=(300, 7)).astype(dtype)
    assert not_finite(x, 64) is None and not_finite(np.zeros((0, 3), dtype)) is None
    x[299, 6] = -np.inf
    assert not_finite(x, 64) == "infinite"
    x[150, 3] = np.nan
    assert not_finite(x, 64) == "NaN" and not_finite(x.T, 64) == "NaN"


# ---- written ----
def saved(directory, targets):
    save_params(directory, targets)
    stored = OrbaxReader(directory)
    return {path: stored.read(path) for path in stored.arrays}


def test_what_is_written_is_what_was_put_together(tmp_path, rng, monkeypatch):
    tensors, table, shapes = small(rng)
    memory = Memory(tensors)
    targets, _ = param_readers(table, shapes, TensorFiles().add(memory), None)
    whole = {t.path: t.read() for t in targets}
    for name, limits in (("whole", (2**24, 2**27)), ("pieces", (64, 100))):
        monkeypatch.setattr(chunk_shape, "__defaults__", limits[:1])
        monkeypatch.setattr(blocks_of, "__defaults__", limits[1:])
        made = saved(tmp_path / name, targets)
        assert {k: (v.dtype, v.tobytes()) for k, v in made.items()} == {k: (v.dtype, v.tobytes()) for k, v in whole.items()}
        assert set(memory.released) == set(tensors)


def test_a_read_of_one_layer(tmp_path, rng):
    """Arrays that Orbax stored in one piece are unpacked once, then read by layer."""
    import jax.numpy as jnp

    from tests.miniature import configs
    from xomni_jax.checkpoint.store import save_component

    big = rng.normal(size=(3, 700, 1100)).astype(np.float32)
    save_component(tmp_path, "siglip_vq", {"a": {"kernel": jnp.asarray(big)}, "b": jnp.arange(6.0)}, configs()["siglip_vq"])
    (tmp_path / "spill").mkdir()
    stored = OrbaxReader(tmp_path / "siglip_vq", tmp_path / "spill")
    for i in (2, 0, 1):
        np.testing.assert_array_equal(stored.read("a/kernel", i), big[i])
    np.testing.assert_array_equal(
        OrbaxReader(tmp_path / "siglip_vq").read("a/kernel", (slice(1, 2), slice(3, 5), slice(0, 1100))), big[1:2, 3:5]
    )
    np.testing.assert_array_equal(stored.read("b"), np.arange(6.0))
    assert isinstance(stored._kept["a/kernel"], np.memmap) and not os.listdir(tmp_path / "spill")


HOST = """
import sys
import jax
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]), initialization_timeout=60)
from xomni_jax.checkpoint import convert, param_reader, stream
param_reader.blocks_of.__defaults__ = (20_000,)
stream.chunk_shape.__defaults__ = (10_000,)
mine = []
release = param_reader.ParamReader.release  # once after each block
param_reader.ParamReader.release = lambda self: mine.append(self.path) or release(self)
convert.convert(*sys.argv[3:6], say=lambda line: None)
print(len(mine), "blocks")
"""


def test_two_hosts_write_a_part_each(released, converted, tmp_path):
    """Two processes of four devices: the model is the one that a single process writes."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    arguments = [str(port), "HOST", *map(str, released), str(tmp_path / "out")]
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "4", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, *(a.replace("HOST", str(i)) for a in arguments)],
            cwd=ROOT,
            env=env,
            stdout=-1,
            stderr=-1,
            text=True,
        )
        for i in (0, 1)
    ]
    told = [host.communicate(timeout=280) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], told
    counts = [int(out.split()[-2]) for out, _ in told]
    assert min(counts) > 100 and abs(counts[0] - counts[1]) <= 6, counts
    for name in json.loads((tmp_path / "out" / "model.json").read_text())["components"]:
        one, two = OrbaxReader(converted[0] / name), OrbaxReader(tmp_path / "out" / name)
        assert set(one.arrays) == set(two.arrays)
        for path in one.arrays:
            assert one.read(path).tobytes() == two.read(path).tobytes(), path
    assert (
        json.loads((tmp_path / "out" / "conversion.json").read_text())["files"]
        == json.loads((converted[0] / "conversion.json").read_text())["files"]
    )


def test_a_failing_write_is_an_error(tmp_path, rng):
    class Broken(Memory):
        def read(self, key):
            raise OSError(28, "No space left on device")

    tensors, table, shapes = small(rng)
    targets, _ = param_readers(table, shapes, TensorFiles().add(Broken(tensors)), None)
    with pytest.raises(OSError, match="No space left"):
        save_params(tmp_path / "out", targets)
    assert not (tmp_path / "out").exists()
    assert flatten({"a": {"b": 1}}) == {"a/b": 1} and isinstance(targets[0], ParamReader)
