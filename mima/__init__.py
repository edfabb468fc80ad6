"""Immunize text-to-image models against fine-tuning on many harmful concepts at once.

Where to begin: `mima/immunization/algorithm.py` is the algorithm as the paper states it,
`mima/reference.py` the mathematics in plain PyTorch, `mima/bilevel/outer.py` the two-pass gradient.

Importing this package does no work: each public name loads its module when it is first used.

Examples:
    >>> import mima
    >>> from mima.immunization.recipes import default
    >>> config = default("relearn", steps=100, rate=1e-4)  # the shipped model's rates are larger
    >>> result = mima.immunize(mima.load_embedded(), [mima.embedded_concept("tiger")], config)
    >>> result.save_pretrained("immunized")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from mima._version import __version__

if TYPE_CHECKING:
    from mima.adapters.merge import MergedAdapters, merge_adapters
    from mima.concepts import (
        Concept,
        Picture,
        embedded_concept,
        embedded_concepts,
        load_concepts,
    )
    from mima.errors import MimaError
    from mima.families.loading import ModelSource, load_embedded
    from mima.immunization.algorithm import immunize
    from mima.immunization.config import ImmunizeConfig
    from mima.immunization.result import ImmunizeResult
    from mima.release.delta import load_delta

__all__ = [
    "Concept",
    "ImmunizeConfig",
    "ImmunizeResult",
    "MergedAdapters",
    "MimaError",
    "ModelSource",
    "Picture",
    "__version__",
    "embedded_concept",
    "embedded_concepts",
    "immunize",
    "load_concepts",
    "load_delta",
    "load_embedded",
    "merge_adapters",
]

_MODULE_OF = {
    "ImmunizeConfig": "immunization.config",
    "ImmunizeResult": "immunization.result",
    "MergedAdapters": "adapters.merge",
    "MimaError": "errors",
    "ModelSource": "families.loading",
    "immunize": "immunization.algorithm",
    "load_delta": "release.delta",
    "load_embedded": "families.loading",
    "merge_adapters": "adapters.merge",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"mima.{_MODULE_OF.get(name, 'concepts')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
