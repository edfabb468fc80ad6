"""The one place that states the version, and what results say of the versions they came from."""

__version__ = "0.2.0"


def installed_versions() -> dict[str, str]:
    """Versions of Python and of what numbers depend on, by package name."""
    import platform
    from importlib.metadata import version

    packages = ("mima", "torch", "diffusers", "transformers", "peft", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
