"""Flags that several commands share, and what they mean. Owns their spelling and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from workers.errors import Rejected
from workers.spec import DTYPE_BYTES, DType

TpSize = Annotated[int, typer.Option("--tp-size", "--tensor-parallel-size", min=1, help="Ranks that share each layer (-tp).")]
PpSize = Annotated[int, typer.Option("--pp-size", "--pipeline-parallel-size", min=1, help="Stages that share the layers (-pp).")]
DTypeName = Annotated[str, typer.Option("--dtype", help="fp32, bf16 or fp16; the source's own when not given.")]
CacheDir = Annotated[Path | None, typer.Option("--cache-dir", envvar="TRIREME_CACHE_DIR", help="Where models are kept.")]

#: Spellings that other tools taught people.
_SPELLINGS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "auto": ""}


def dtype_of(name: str) -> DType | None:
    """The number format that a flag names; None = the source's own. Raises :class:`Rejected`."""
    name = _SPELLINGS.get(name, name)
    if name and name not in DTYPE_BYTES:
        raise Rejected(f"--dtype {name} is not a number format", hint=f"use {', '.join(DTYPE_BYTES)}")
    return cast("DType", name) or None


def cache_folder(chosen: Path | None) -> Path:
    """The folder of downloads and conversions: the flag's (or TRIREME_CACHE_DIR's), else the user's cache."""
    return chosen or Path.home() / ".cache" / "trireme"
