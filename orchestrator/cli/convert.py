"""`trireme convert`: a model written as a TensorRT-LLM checkpoint. `workers.artifacts.convert` does the work."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.console import Console, size
from orchestrator.cli.model_files import formats, locate_model
from orchestrator.cli.model_options import CacheDir, DTypeName, PpSize, QuantFlag, TpSize, cache_folder, dtype_of, quant_from
from workers.protocol.specs import Parallel


def convert(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A model's name, a Hugging Face folder, a GGUF or a checkpoint.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; an existing checkpoint is replaced at the end.")],
    tp_size: TpSize = 1,
    pp_size: PpSize = 1,
    dtype: DTypeName = "",
    quant: QuantFlag = "",
    group_size: Annotated[int | None, typer.Option("--group-size", help="Inputs that share a scale: 32, 64 (default) or 128.")] = None,
    fp8_kv_cache: Annotated[bool, typer.Option("--fp8-kv-cache", help="Keys and values in FP8, on a GPU.")] = False,
    trtllm: Annotated[bool, typer.Option("--for-trtllm", help="Only layouts that TensorRT-LLM accepts.")] = False,
    cache_dir: CacheDir = None,
) -> None:
    """Write a model as a TensorRT-LLM checkpoint for tp x pp ranks: config.json, rank<N>.safetensors, tokenizer, manifest."""
    from orchestrator.model_store import built_tokenizer
    from workers.artifacts import convert as conversion
    from workers.artifacts.inspect import inspect_path

    console: Console = context.obj
    parallel = Parallel(tp=tp_size, pp=pp_size)
    chosen, form = quant_from(quant, group_size), dtype_of(dtype)
    started = time.monotonic()
    path = locate_model(model, console, cache_dir)
    with console.progress() as progress:
        tokenizer = built_tokenizer(path, cache_folder(cache_dir), progress)
        conversion.convert(
            path,
            output,
            parallel=parallel,
            dtype=form,
            quant=chosen,
            fp8_kv_cache=fp8_kv_cache,
            for_trtllm=trtllm,
            tokenizer=tokenizer,
            progress=progress,
        )
    made = inspect_path(output, parallel)
    seconds = time.monotonic() - started
    shards = f"{len(made.rank_bytes)} shards, {size(sum(made.rank_bytes))} {formats(made)}"
    console.say(f"{output}: tp={tp_size} pp={pp_size}, {shards}, {seconds:.1f} s", path=str(output), seconds=round(seconds, 1))
