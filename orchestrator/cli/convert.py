"""`trireme pull`, `convert` and `inspect`: models on disk. `orchestrator.model_store` and `workers.artifacts` do the work."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from orchestrator.cli.console import Console, size
from orchestrator.cli.options import CacheDir, DTypeName, PpSize, QuantFlag, TpSize, cache_folder, dtype_of, quant_from
from workers.protocol.errors import ArtifactError
from workers.protocol.specs import Parallel

if TYPE_CHECKING:
    from workers.artifacts.inspect import Inspection


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


def source(model: str, console: Console, cache_dir: Path | None) -> Path:
    """:func:`orchestrator.model_store.locate`, its progress shown."""
    from orchestrator import model_store

    with console.progress() as progress:
        return model_store.locate(model, cache_folder(cache_dir), progress)


def convert(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A model's name, a Hugging Face folder, a GGUF or a checkpoint.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; a checkpoint that is there is replaced at the end.")],
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
    from workers.artifacts import convert as conversion
    from workers.artifacts.inspect import inspect_path

    console: Console = context.obj
    parallel = Parallel(tp=tp_size, pp=pp_size)
    chosen, form = quant_from(quant, group_size), dtype_of(dtype)
    started = time.monotonic()
    path = source(model, console, cache_dir)
    with console.progress() as progress:
        conversion.convert(
            path, output, parallel=parallel, dtype=form, quant=chosen, fp8_kv_cache=fp8_kv_cache, for_trtllm=trtllm, progress=progress
        )
    made = inspect_path(output, parallel)
    seconds = time.monotonic() - started
    shards = f"{len(made.rank_bytes)} shards, {size(sum(made.rank_bytes))} {formats(made)}"
    console.say(f"{output}: tp={tp_size} pp={pp_size}, {shards}, {seconds:.1f} s", path=str(output), seconds=round(seconds, 1))


def inspect(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A model's name, a Hugging Face folder, a GGUF or a checkpoint.")],
    tp_size: Annotated[int | None, typer.Option("--tp-size", "--tensor-parallel-size", min=1, help="Can it run like this? (-tp)")] = None,
    pp_size: Annotated[int | None, typer.Option("--pp-size", "--pipeline-parallel-size", min=1, help="Can it run like this? (-pp)")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and compare every hash.")] = False,
    form: Annotated[str, typer.Option("--output", "-o", metavar="text|json")] = "text",
    cache_dir: CacheDir = None,
) -> None:
    """Say what a model file holds, and whether it can run on a layout; exit code 3 when it cannot."""
    from workers.artifacts.inspect import inspect_path

    console: Console = context.obj
    asked = Parallel(tp=tp_size or 1, pp=pp_size or 1) if tp_size or pp_size else None
    found = inspect_path(source(model, console, cache_dir), asked, verify_files=verify)
    if form == "json":
        console.out(json.dumps(msgspec.to_builtins(found, enc_hook=str), indent=2))
    else:
        console.out("\n".join(f"{key:<14}{value}" for key, value in describe(found, asked)))
    if not found.runs:
        layout = asked or found.parallel or Parallel()
        hint = f"trireme convert {model} -tp {layout.tp} -pp {layout.pp} -o DIR" if "convert" in found.reason else ""
        raise ArtifactError(f"{model} does not run on tp={layout.tp} pp={layout.pp} as it is", found.reason, hint)


def describe(found: Inspection, asked: Parallel | None) -> list[tuple[str, str]]:
    """The rows of `trireme inspect`."""
    model, layout = found.model, asked or found.parallel or Parallel()
    heads = f"{model.num_heads} query / {model.num_kv_heads} key-value heads of {model.head_dim}"
    tied = ", tied embeddings" if model.tied_embeddings else ""
    rows = [
        ("path", str(found.path)),
        ("kind", found.kind if found.parallel is None else f"{found.kind} for tp={found.parallel.tp} pp={found.parallel.pp}"),
        ("architecture", f"{model.architecture}, {model.num_layers} layers, hidden {model.hidden_size}, {heads}"),
        ("vocabulary", f"{model.vocab_size} tokens{tied}; context {model.max_position}"),
        ("weights", f"{found.parameters:,} parameters, {formats(found)}"),
        ("tokenizer", f"yes, ends on {', '.join(map(str, found.eos_ids))}" if found.tokenizer else "none"),
    ]
    if found.rank_bytes:
        rows.append((f"tp={layout.tp} pp={layout.pp}", "a rank: " + ", ".join(map(size, found.rank_bytes))))
    rows.append(("portable", "runs" if found.runs else found.reason))
    rows.append(("TensorRT-LLM", found.trtllm or ("layout accepted" if found.rank_bytes else found.reason)))
    if found.verified:
        rows.append(("verified", "every file"))
    return rows


def formats(found: Inspection) -> str:
    """The number formats of the weights: the linear layers' first where they are quantized, then that of the rest."""
    quant = found.quant
    cache = f"; KV cache {quant.kv_cache_quant_algo}" if quant.kv_cache_quant_algo else ""
    if quant.quant_algo is None:
        return found.dtype + cache
    groups = f" in groups of {quant.group_size}" if quant.group_size else ""
    return f"{quant.weights or 'quantized'} ({quant.quant_algo}){groups}, the rest {found.dtype}{cache}"


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    for command in (pull, convert, inspect):
        app.command()(command)
