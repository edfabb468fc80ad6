"""Immunize text-to-image models against fine-tuning on many harmful concepts at once.

Importing this package does no work: each public name loads its module when it is first used.

Example:
    >>> import mima
    >>> result = mima.immunize(mima.load_embedded(), [mima.embedded_concept("tiger")])
    >>> result.save_pretrained("immunized")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mima._lazy import load_on_use
from mima._version import __version__

if TYPE_CHECKING:
    from mima.adapter_merge import MergedAdapters, merge_adapters
    from mima.concepts import Concept, embedded_concept, embedded_concepts, load_concepts
    from mima.config import ImmunizeConfig
    from mima.embedded import load_embedded
    from mima.errors import MimaError
    from mima.families import ModelSource
    from mima.immunize import ImmunizeResult, immunize
    from mima.pictures import Picture
    from mima.saving import load_delta

_MODULE_OF = {
    "Concept": "mima.concepts",
    "ImmunizeConfig": "mima.config",
    "ImmunizeResult": "mima.immunize",
    "MergedAdapters": "mima.adapter_merge",
    "MimaError": "mima.errors",
    "ModelSource": "mima.families",
    "Picture": "mima.pictures",
    "embedded_concept": "mima.concepts",
    "embedded_concepts": "mima.concepts",
    "immunize": "mima.immunize",
    "load_concepts": "mima.concepts",
    "load_delta": "mima.saving",
    "load_embedded": "mima.embedded",
    "merge_adapters": "mima.adapter_merge",
}

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

load_on_use(__name__, _MODULE_OF)
