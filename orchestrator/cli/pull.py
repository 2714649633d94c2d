"""`trireme pull`: a named model, or a model of a hub, fetched into the cache. `orchestrator.model_store` does the work."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.console import Console
from orchestrator.cli.model_options import CacheDir, Revision, cache_folder


def pull(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A name, or a hub id: ORG/NAME[:GGUF][@REVISION]; else the default model.")] = "",
    revision: Revision = "",
    cache_dir: CacheDir = None,
) -> None:
    """Fetch a model into the cache and verify its hashes; a model in the cache is only verified."""
    from orchestrator import model_store
    from orchestrator.hub.reference import at_revision

    console: Console = context.obj
    with console.progress() as progress:
        path = model_store.pull(at_revision(model or model_store.DEFAULT_MODEL, revision), cache_folder(cache_dir), progress)
    if not console.settings.quiet:
        console.out(str(path))
