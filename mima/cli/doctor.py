"""`mima doctor`."""

from __future__ import annotations

from mima.cli.base import app


@app.command()
def doctor() -> None:
    """Show versions, devices, and which backend serves each operator, or why not."""
    from mima.cli.diagnosis import show

    show()
