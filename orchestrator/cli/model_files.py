"""Shared by `convert` and `inspect`: the path of a named model, and its number formats as text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.cli.console import Console
from orchestrator.cli.model_options import cache_folder

if TYPE_CHECKING:
    from workers.artifacts.inspect import Inspection


def locate_model(model: str, console: Console, cache_dir: Path | None) -> Path:
    """:func:`orchestrator.model_store.locate`, with progress."""
    from orchestrator import model_store

    with console.progress() as progress:
        return model_store.locate(model, cache_folder(cache_dir), progress)


def formats(found: Inspection) -> str:
    """The number formats of the weights: first that of the linear layers if they are quantized, then that of the rest."""
    quant = found.quant
    cache = f"; KV cache {quant.kv_cache_quant_algo}" if quant.kv_cache_quant_algo else ""
    if quant.quant_algo is None:
        source = f", dequantized from {found.dequantized} while loading" if found.dequantized else ""
        return found.dtype + source + cache
    groups = f" in groups of {quant.group_size}" if quant.group_size else ""
    return f"{quant.weights or 'quantized'} ({quant.quant_algo}){groups}, the rest {found.dtype}{cache}"
