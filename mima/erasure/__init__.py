"""Erase concepts from a model before it is immunized against their return."""

from mima.erasure.uce import Edit, edits_of, erase

__all__ = ["Edit", "edits_of", "erase"]
