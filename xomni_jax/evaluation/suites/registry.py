"""The suites by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from xomni_jax.evaluation.suite import Suite, SuiteError
from xomni_jax.evaluation.suites import docvqa, dpg, geneval, gqa, longtext, mmbench, ocrbench, oneig_text, pope, rendered, seedbench
from xomni_jax.evaluation.suites.choices import INSTRUCTIONS, Choices

BUILDERS: dict[str, Callable[[str, Choices], Suite]] = {
    "longtext-en": longtext.suite,
    "longtext-zh": longtext.suite,
    "oneig-text-en": oneig_text.suite,
    "oneig-text-zh": oneig_text.suite,
    "geneval": geneval.suite,
    "dpg": dpg.suite,
    "pope": pope.suite,
    "gqa": gqa.suite,
    "mmbench": mmbench.suite,
    "seedbench": seedbench.suite,
    "docvqa": docvqa.suite,
    "ocrbench": ocrbench.suite,
}
PUBLISHED = tuple(BUILDERS)  # what "all" means
BUILDERS |= dict.fromkeys(("rendered-text", "rendered-shapes", "rendered-qa"), rendered.suite)


def get_suite(name: str, switches: Iterable[str] = (), instructions: Mapping[str, str] | None = None) -> Suite:
    """The suite `name` with some of its `switches` on and instructions worded otherwise (see `choices.INSTRUCTIONS`).

    SuiteError for a name, switch or instruction that does not exist.
    """
    if name not in BUILDERS:
        raise SuiteError(f"the suite {name!r} is unknown; choose one of {', '.join(BUILDERS)}")
    known = BUILDERS[name](name, Choices()).switches
    for switch in switches:
        if switch not in known:
            raise SuiteError(f"{name} has no switch {switch!r}; it has {', '.join(known) or 'none'}")
    for instruction, text in (instructions or {}).items():
        if instruction not in INSTRUCTIONS or not isinstance(text, str) or not text.strip():
            raise SuiteError(f"there is no instruction {instruction!r}, or its text is empty; there are {', '.join(INSTRUCTIONS)}")
    return BUILDERS[name](name, Choices(frozenset(switches), dict(instructions or {})))
