"""Names lead to objects: shipped, from a user's file, or to one clear sentence."""

import pytest

from xomni_jax.core.registry import Registry, RegistryError

SHIPPED = Registry("scorer", {"path": "pathlib:Path", "missing": "no_such_module_here:Thing"})


def test_a_shipped_name_is_imported_when_used():
    from pathlib import Path

    assert SHIPPED.names() == ["path", "missing"] and SHIPPED.get("path") is Path
    with pytest.raises(ImportError):
        SHIPPED.get("missing")


def test_a_users_own_file(tmp_path):
    (tmp_path / "mine.py").write_text("class Mine:\n    pass\n")
    found = SHIPPED.get(f"{tmp_path}/mine.py:Mine")
    assert found.__name__ == "Mine" and SHIPPED.get(f"{tmp_path}/mine.py:Mine") is found


@pytest.mark.parametrize(
    "name, says",
    [
        ("pathh", "the scorer 'pathh' is unknown; use one of path, missing, or a class of your own as path/to/file.py:Class"),
        ("{tmp}/none.py:Mine", "{tmp}/none.py: no such file; a scorer of your own is written path/to/file.py:Class"),
        ("{tmp}/mine.py:Other", "{tmp}/mine.py defines no 'Other'; it defines Mine"),
        ("{tmp}/broken.py:Mine", "{tmp}/broken.py: NameError: name 'undefined' is not defined"),
    ],
)
def test_what_is_wrong_is_said(name, says, tmp_path):
    (tmp_path / "mine.py").write_text("class Mine:\n    pass\n")
    (tmp_path / "broken.py").write_text("undefined\n")
    with pytest.raises(RegistryError) as e:
        SHIPPED.get(name.format(tmp=tmp_path))
    assert str(e.value) == says.format(tmp=tmp_path)
