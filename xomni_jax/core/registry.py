"""Named implementations: the shipped ones, a user's own file, and those of installed packages."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any


class RegistryError(ValueError):
    """A name leads to no implementation; the message is one sentence with the remedy."""


class Registry:
    """Looks implementations up by name, and imports a module only when one of its objects is asked for.

    A name is one of `shipped`, `path/to/file.py:Name` for a user's own file, or an entry point of the group `xomni_jax.<kind>`
    of an installed package.

    Attributes:
      kind: what is registered, in the singular, for messages and the entry point group: "scorer", "source", "suite", "method".
      shipped: {name: "module:object"}.
    """

    def __init__(self, kind: str, shipped: Mapping[str, str]):
        self.kind, self.shipped = kind, dict(shipped)

    def names(self) -> list[str]:
        """Every name that needs no path: the shipped ones in their order, then those of installed packages."""
        return [*self.shipped, *sorted(set(self._installed()) - set(self.shipped))]

    def summaries(self) -> dict[str, str]:
        """First docstring line of each shipped implementation's module, read without importing it: its packages may be missing."""
        lines = {}
        for name, target in self.shipped.items():
            source = Path(importlib.util.find_spec(target.partition(":")[0]).origin).read_text(encoding="utf-8")
            lines[name] = ast.get_docstring(ast.parse(source)).splitlines()[0]
        return lines

    def get(self, name: str) -> Any:
        """The object of a name.

        Raises:
          RegistryError: the name is unknown, or the file cannot be imported or lacks the object.
          ImportError: a shipped implementation needs a package that is not installed.
        """
        if name in self.shipped:
            module, _, attribute = self.shipped[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        path, colon, attribute = name.rpartition(":")
        if colon and path.endswith(".py"):
            module = import_file(path, self.kind)
            if not hasattr(module, attribute):
                own = ", ".join(sorted(k for k, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__))
                raise RegistryError(f"{path} defines no {attribute!r}; it defines {own or 'nothing'}")
            return getattr(module, attribute)
        installed = self._installed()
        if name in installed:
            return installed[name].load()
        raise RegistryError(
            f"the {self.kind} {name!r} is unknown; use one of {', '.join(self.names())}, or a class of your own as path/to/file.py:Class"
        )

    def _installed(self) -> dict[str, metadata.EntryPoint]:
        return {point.name: point for point in metadata.entry_points(group=f"xomni_jax.{self.kind}")}


def import_file(path: str, kind: str) -> ModuleType:
    """A module from a user's Python file; imported once, so that classes keep their identity.

    Raises:
      RegistryError: the file is missing or raises while it is imported.
    """
    file = Path(path).expanduser().resolve()
    name = f"xomni_user_{file.stem}_{abs(hash(str(file)))}"
    if name in sys.modules:
        return sys.modules[name]
    if not file.is_file():
        raise RegistryError(f"{path}: no such file; a {kind} of your own is written path/to/file.py:Class")
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as e:  # noqa: BLE001 - the file is the user's code, which may raise anything
        del sys.modules[name]
        raise RegistryError(f"{path}: {type(e).__name__}: {(str(e).strip().splitlines() or [''])[0]}") from e
    return module
