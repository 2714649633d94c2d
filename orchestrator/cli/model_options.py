"""Flags of a model that several commands share: layout, number formats, cache folder. Owns their spelling and their meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from workers.protocol.errors import Rejected
from workers.protocol.specs import DTYPE_BYTES, QUANT_ALGOS, DType, Quant, QuantName, quant_of

TpSize = Annotated[int, typer.Option("--tp-size", "--tensor-parallel-size", min=1, help="Ranks that share each layer (-tp).")]
PpSize = Annotated[int, typer.Option("--pp-size", "--pipeline-parallel-size", min=1, help="Stages that share the layers (-pp).")]
ExpertParallel = Annotated[
    bool, typer.Option("--expert-parallel", "--enable-expert-parallel", help="Whole experts on the ranks of a stage, not their columns.")
]
DTypeName = Annotated[str, typer.Option("--dtype", help="fp32, bf16 or fp16; by default the source's format.")]
QuantFlag = Annotated[str, typer.Option("--quant", help="Quantize weights to int8, int4 or fp8.")]
Revision = Annotated[str, typer.Option("--revision", help="Branch, tag or commit of a hub's model.")]
CacheDir = Annotated[Path | None, typer.Option("--cache-dir", envvar="TRIREME_CACHE_DIR", help="Folder of models.")]

#: Spellings that users know from other tools.
_SPELLINGS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "auto": ""}


def dtype_of(name: str) -> DType | None:
    """The number format in a flag; None = the source's own. Raises :class:`Rejected`."""
    name = _SPELLINGS.get(name, name)
    if name and name not in DTYPE_BYTES:
        raise Rejected(f"--dtype {name} is not a number format", hint=f"use {', '.join(DTYPE_BYTES)}")
    return cast("DType", name) or None


def quant_name(name: str) -> QuantName | None:
    """The weight format in a flag, under our name or TensorRT-LLM's; None = unchanged. Raises :class:`Rejected`."""
    if not name:
        return None
    known = {spelling: short for short, algo in QUANT_ALGOS.items() for spelling in (short, algo.lower())}
    if name.lower() not in known:
        raise Rejected(f"--quant {name} is not a weight format", hint=f"use {', '.join(QUANT_ALGOS)}")
    return known[name.lower()]


def quant_from(name: str, group_size: int | None) -> Quant | None:
    """The quantization of ``--quant`` and ``--group-size``; None = weights unchanged. Raises :class:`Rejected`."""
    chosen = quant_name(name)
    if chosen is None and group_size is not None:
        raise Rejected("--group-size means nothing without --quant", hint="add --quant int4")
    return None if chosen is None else quant_of(chosen, group_size)


def cache_folder(chosen: Path | None) -> Path:
    """The folder of downloads and conversions: that of the flag (or of TRIREME_CACHE_DIR), else the user's cache."""
    return chosen or Path.home() / ".cache" / "trireme"
