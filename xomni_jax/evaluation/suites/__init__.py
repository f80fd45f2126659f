"""The benchmarks: one module each, all of them `Suite` objects made by `get_suite`."""

from xomni_jax.evaluation.suites.registry import BUILDERS, PUBLISHED, get_suite
from xomni_jax.evaluation.suites.rewriting import with_rewrites

SUITES = tuple(BUILDERS)

__all__ = ["PUBLISHED", "SUITES", "get_suite", "with_rewrites"]
