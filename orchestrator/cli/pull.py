"""`trireme pull`: a named model fetched into the cache. `orchestrator.model_store` does the work."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.console import Console
from orchestrator.cli.model_options import CacheDir, cache_folder


def pull(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A model's name; the default model when not given.")] = "",
    cache_dir: CacheDir = None,
) -> None:
    """Fetch a named model into the cache and verify its sha256; a second time only the check is made."""
    from orchestrator import model_store

    console: Console = context.obj
    with console.progress() as progress:
        path = model_store.pull(model or model_store.DEFAULT_MODEL, cache_folder(cache_dir), progress)
    if not console.settings.quiet:
        console.out(str(path))
