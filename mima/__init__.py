"""Immunize text-to-image models against fine-tuning on many harmful concepts at once.

Importing this package does no work: each public name loads its module when it is first used.

Example:
    >>> import mima
    >>> result = mima.immunize(mima.load_embedded(), [mima.embedded_concept("cat")])
    >>> result.save_pretrained("immunized")
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from mima._version import __version__

if TYPE_CHECKING:
    from mima.concepts import Concept, embedded_concept, embedded_concepts, load_concepts
    from mima.config import ImmunizeConfig
    from mima.embedded import load_embedded
    from mima.errors import MimaError
    from mima.immunize import ImmunizeResult, immunize
    from mima.pictures import Picture

_MODULE_OF = {
    "Concept": "mima.concepts",
    "ImmunizeConfig": "mima.config",
    "ImmunizeResult": "mima.immunize",
    "MimaError": "mima.errors",
    "Picture": "mima.pictures",
    "embedded_concept": "mima.concepts",
    "embedded_concepts": "mima.concepts",
    "immunize": "mima.immunize",
    "load_concepts": "mima.concepts",
    "load_embedded": "mima.embedded",
}

__all__ = [
    "Concept",
    "ImmunizeConfig",
    "ImmunizeResult",
    "MimaError",
    "Picture",
    "__version__",
    "embedded_concept",
    "embedded_concepts",
    "immunize",
    "load_concepts",
    "load_embedded",
]


class _Package(ModuleType):
    """Resolves the public names when they are first used.

    A module-level `__getattr__` would do, but for one name: importing the module `mima.immunize`
    binds it over the function `mima.immunize`, and whoever imports later gets the module.
    """

    def __getattr__(self, name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'mima' has no attribute {name!r}")
        value = getattr(import_module(_MODULE_OF[name]), name)
        super().__setattr__(name, value)
        return value

    def __setattr__(self, name: str, value: object) -> None:
        if name in _MODULE_OF and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
