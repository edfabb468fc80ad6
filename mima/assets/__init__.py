"""What ships inside the package: a small text-to-image model, sample concepts, captions."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def assets() -> Path:
    """The folder of shipped assets."""
    # wheels and editable installs both unpack to real folders, which diffusers needs
    return Path(str(resources.files("mima.assets")))
