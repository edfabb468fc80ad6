"""The commands. Each body imports what it needs, so that `mima --help` is instant."""

from mima.cli import (  # noqa: F401, I001 - each registers its command, in the order of the help
    demo,
    immunize,
    adapt,
    erase,
    merge,
    publish,
    sample,
    evaluate,
    doctor,
)
from mima.cli.base import app, main

__all__ = ["app", "main"]
