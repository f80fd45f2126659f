"""The benchmarks by name. A module is imported when one of its suites is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from xomni_jax.core.registry import Registry
from xomni_jax.evaluation.suite import Suite, SuiteError

_HERE = "xomni_jax.evaluation.suites"
PUBLISHED = {
    "longtext-en": f"{_HERE}.longtext:LongText",
    "longtext-zh": f"{_HERE}.longtext:LongText",
    "oneig-text-en": f"{_HERE}.oneig_text:OneIGText",
    "oneig-text-zh": f"{_HERE}.oneig_text:OneIGText",
    "geneval": f"{_HERE}.geneval:GenEval",
    "dpg": f"{_HERE}.dpg:DPG",
    "pope": f"{_HERE}.pope:POPE",
    "gqa": f"{_HERE}.short_answers:GQA",
    "mmbench": f"{_HERE}.multiple_choice:MMBench",
    "seedbench": f"{_HERE}.multiple_choice:SEEDBench",
    "docvqa": f"{_HERE}.short_answers:DocVQA",
    "ocrbench": f"{_HERE}.ocrbench:OCRBench",
}
_MEASURED = ("Reasoning", "Style", "Diversity")
_COMPOSITIONS = ("Color", "Shape", "Texture", "Spatial", "Non-Spatial", "Complex")
FURTHER = {  # that the papers of related systems report
    "mmbench-cn": f"{_HERE}.multiple_choice:MMBenchCN",
    "mmmu": f"{_HERE}.mmmu:MMMU",
    "wise": f"{_HERE}.wise:WISE",
    "wise-verified": f"{_HERE}.wise:WISEVerified",
    "oneig-alignment-en": f"{_HERE}.oneig_alignment:Alignment",
    "oneig-alignment-zh": f"{_HERE}.oneig_alignment:Alignment",
    **{f"oneig-{d.lower()}-{language}": f"{_HERE}.oneig_measured:{d}" for d in _MEASURED for language in ("en", "zh")},
    **{f"t2i-compbench-{kind.lower()}": f"{_HERE}.t2i_compbench:T2ICompBench" for kind in _COMPOSITIONS},
}
RENDERED = {
    "rendered-text": f"{_HERE}.rendered:RenderedText",
    "rendered-shapes": f"{_HERE}.rendered:RenderedShapes",
    "rendered-qa": f"{_HERE}.rendered:RenderedQA",
}
SUITES = Registry("suite", PUBLISHED | FURTHER | RENDERED)
GROUPS = {"all": tuple(PUBLISHED), "rendered": tuple(RENDERED)}  # what one command can run


def get_suite(name: str, switches: Iterable[str] = (), instructions: Mapping[str, str] | None = None) -> Suite:
    """A suite with some of its `switches` on and some instructions worded otherwise.

    Args:
      name: a shipped suite, one of an installed package, or `path/to/file.py:Class`.

    Raises:
      RegistryError: there is no such suite.
      SuiteError: the class is no Suite, or a switch or instruction does not exist.
    """
    kind = SUITES.get(name)
    if not (isinstance(kind, type) and issubclass(kind, Suite)):
        raise SuiteError(f"{name} is no subclass of xomni_jax.evaluation.suite.Suite")
    return kind("" if ".py:" in name else name, tuple(switches), instructions)
