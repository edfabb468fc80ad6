"""Erase concepts from a model before it is immunized against their return."""

from mima.erasure.esd import ESD, VARIANTS
from mima.erasure.published import load_erased
from mima.erasure.uce import Edit, edits_of, erase

__all__ = ["ESD", "VARIANTS", "Edit", "edits_of", "erase", "load_erased"]
