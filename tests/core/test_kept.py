"""What is kept between processes is equal to what would be made, and is made anew where anything that it depends on differs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xomni_jax.core import kept as module
from xomni_jax.core.kept import kept, kept_program


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a program depends on."""

    factor: float = 2.0


@pytest.fixture
def folder(tmp_path):
    """An empty folder of compiled programs."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "traced"
    jax.config.update("jax_compilation_cache_dir", before)


def program(settings, traced):
    """A jitted function of nested arguments, some of them no arrays of floats; it notes when it is traced."""

    def fn(params, keys, state):
        traced.append(settings)
        return {"x": params["w"] * settings.factor + jax.random.uniform(keys)}, [state + 1]

    return kept_program(jax.jit(fn, donate_argnums=2), ("fn", settings), donate=2)


def test_a_program_is_traced_once_and_computes_the_same(folder):
    traced, args = [], ({"w": jnp.arange(3.0), "unused": None}, jax.random.key(1))
    first = program(Settings(), traced)
    results = [first(*args, jnp.zeros(4)), first(*args, jnp.zeros(4)), program(Settings(), traced)(*args, jnp.zeros(4))]
    for out, (state,) in results:
        np.testing.assert_array_equal(out["x"], args[0]["w"] * 2 + jax.random.uniform(args[1]))
        np.testing.assert_array_equal(state, np.ones(4))
    assert set(traced) == {Settings()} and len(list(folder.iterdir())) == 1
    again = len(traced)
    program(Settings(3.0), traced)(*args, jnp.zeros(4))
    program(Settings(), traced)(*args, jnp.zeros(5))
    assert len(traced) > again and len(list(folder.iterdir())) == 3


def test_the_state_is_donated(folder):
    state = jnp.zeros(4)
    program(Settings(), [])({"w": jnp.ones(3)}, jax.random.key(0), state)
    assert state.is_deleted()


def test_other_code_or_settings_make_it_anew(folder, monkeypatch):
    made = []
    make = lambda: made.append(len(made)) or len(made)
    assert [kept("a", make), kept("a", make), kept("b", make)] == [1, 1, 2]
    monkeypatch.setattr(module, "source_digest", lambda: "edited")
    assert kept("a", make) == 3
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert [kept("a", make), kept("a", make)] == [4, 5]
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
