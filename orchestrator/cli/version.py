"""`trireme version`."""

from __future__ import annotations

import typer

from workers import __version__


def version(context: typer.Context) -> None:
    """Print the version."""
    context.obj.out(f"trireme {__version__}")
