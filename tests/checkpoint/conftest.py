"""Released directories and what they become, made once."""

import pytest

from tests.checkpoint import released_dirs as dirs
from xomni_jax.checkpoint.convert import convert


@pytest.fixture(scope="session")
def released(tmp_path_factory):
    """(X-Omni, FLUX.1-dev), small."""
    folder = tmp_path_factory.mktemp("released")
    return dirs.write_xomni(folder / "xomni"), dirs.write_flux(folder / "flux")


@pytest.fixture(scope="session")
def converted(released, tmp_path_factory):
    """The model directory of both; (directory, lines said)."""
    lines, to = [], tmp_path_factory.mktemp("converted") / "model"
    assert convert(*released, to, say=lines.append) == []
    return to, lines


@pytest.fixture
def copies(released, tmp_path):
    """(X-Omni, FLUX.1-dev) to spoil."""
    import shutil

    return tuple(shutil.copytree(folder, tmp_path / folder.name) for folder in released)
