"""Caches results of methods on their object, with which they are freed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def cached_method(method: Callable[..., T]) -> Callable[..., T]:
    """Caches a method's results by its hashable positional arguments. `functools.cache` would keep every object of the class alive."""

    @functools.wraps(method)
    def cached(self: Any, *args: Any) -> T:
        results, key = self.__dict__.setdefault("_method_results", {}), (method.__name__, *args)
        if key not in results:
            results[key] = method(self, *args)
        return results[key]

    return cached
