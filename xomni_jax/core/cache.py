"""Results of methods cached on their object, and so freed with it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def cached_method(method: Callable[..., T]) -> Callable[..., T]:
    """`functools.cache` for a method of hashable positional arguments. That one keeps every object it was called on alive."""

    @functools.wraps(method)
    def cached(self: Any, *args: Any) -> T:
        results, key = self.__dict__.setdefault("_method_results", {}), (method.__name__, *args)
        if key not in results:
            results[key] = method(self, *args)
        return results[key]

    return cached
