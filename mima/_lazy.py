"""Packages that import instantly: each public name loads its module when it is first used."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType


def load_on_use(package: str, module_of: Mapping[str, str]) -> None:
    """Let a package resolve its public names when they are first used.

    A module-level `__getattr__` would do, but for names that a module and a function share:
    importing the module `mima.immunize` binds it over the function `mima.immunize`, and whoever
    imports later gets the module.

    Args:
        package: the package's `__name__`.
        module_of: the module that defines each public name.
    """

    class LazyPackage(ModuleType):
        def __getattr__(self, name: str) -> object:
            if name not in module_of:
                raise AttributeError(f"module {package!r} has no attribute {name!r}")
            value = getattr(import_module(module_of[name]), name)
            super().__setattr__(name, value)
            return value

        def __setattr__(self, name: str, value: object) -> None:
            if name in module_of and isinstance(value, ModuleType):
                return
            super().__setattr__(name, value)

        def __dir__(self) -> list[str]:
            return sorted({*super().__dir__(), *module_of})

    sys.modules[package].__class__ = LazyPackage
