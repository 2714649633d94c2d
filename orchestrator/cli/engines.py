"""`trireme engines`: the TensorRT-LLM engines in this machine's catalogue.

Owns the output. :mod:`workers.engines.trtllm.engine_catalogue` owns the catalogue itself.
"""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.command_group import CommandGroup
from orchestrator.cli.console import Console, age, size, table
from orchestrator.cli.model_options import CacheDir, cache_folder
from workers.protocol.errors import Rejected

if TYPE_CHECKING:
    from workers.engines.trtllm.engine_catalogue import CatalogueEntry
    from workers.engines.trtllm.engine_dir import EngineDir
    from workers.engines.trtllm.node_probe import NodeFacts

engines = typer.Typer(name="engines", cls=CommandGroup, help="The TensorRT-LLM engines that were built here.", no_args_is_help=True)
EngineName = Annotated[str, typer.Argument(metavar="ENGINE", help="The engine's name (or the beginning of it), or its folder.")]
Form = Annotated[str, typer.Option("--output", "-o", metavar="text|json")]


@engines.command("list")
def engines_list(context: typer.Context, form: Form = "text", cache_dir: CacheDir = None) -> None:
    """Every engine in the catalogue."""
    import msgspec

    from workers.engines.trtllm import engine_catalogue

    console: Console = context.obj
    found = engine_catalogue.entries(cache_folder(cache_dir))
    if form == "json":
        console.out(json.dumps(msgspec.to_builtins(found, enc_hook=str), indent=2))
        return
    rows = [[entry.name, *(row(entry.engine) if entry.engine is not None else ["-"] * 7), state(entry)] for entry in found]
    console.out(table(["NAME", "MODEL", "WEIGHTS", "LAYOUT", "CC", "VERSION", "SIZE", "AGE", "STATE"], rows))


def row(engine: EngineDir) -> list[str]:
    """The columns MODEL to AGE of one engine."""
    record, layout = engine.record, f"tp={engine.parallel.tp} pp={engine.parallel.pp}"
    total = size(sum(engine.engine_bytes(rank) for rank in range(engine.world)))
    weights = engine.quant.quant_algo or engine.dtype
    if record is None:
        return ["-", weights, layout, "-", engine.version, total, "-"]
    return [record.model, weights, layout, record.gpu.capability, engine.version, total, age(time.time() - record.began)]


def state(entry: CatalogueEntry) -> str:
    if entry.engine is None:
        return "DAMAGED"
    return "WHOLE" if entry.engine.record is not None else "FOREIGN"


@engines.command("show")
def engines_show(context: typer.Context, engine: EngineName, form: Form = "text", cache_dir: CacheDir = None) -> None:
    """What an engine is, and how it was built."""
    import msgspec

    from workers.engines.trtllm import engine_catalogue
    from workers.engines.trtllm.engine_dir import read_engine_dir

    console: Console = context.obj
    found = read_engine_dir(engine_catalogue.find(cache_folder(cache_dir), engine))
    if form == "json":
        console.out(json.dumps(msgspec.to_builtins(found, enc_hook=str), indent=2))
    else:
        console.out("\n".join(f"{key:<14}{value}" for key, value in describe(found)))


def describe(engine: EngineDir) -> list[tuple[str, str]]:
    """The rows of `trireme engines show`."""
    record = engine.record
    layout = f"tp={engine.parallel.tp} pp={engine.parallel.pp}: {', '.join(size(engine.engine_bytes(n)) for n in range(engine.world))}"
    limits = f"{engine.max_batch_size} sequences, {engine.max_num_tokens} tokens a step, {engine.max_seq_len} a sequence"
    rows = [
        ("path", str(engine.path)),
        ("layout", layout),
        ("weights", f"{engine.dtype}, {engine.quant.quant_algo or 'not quantized'}"),
        ("limits", f"{limits}, {engine.max_input_len} a prompt"),
        ("KV cache", f"{engine.quant.kv_cache_quant_algo or engine.dtype}, blocks of {engine.tokens_per_block} tokens"),
        ("tokenizer", f"yes, ends on {', '.join(map(str, engine.eos_ids))}" if engine.tokenizer_dir else "none"),
        ("TensorRT-LLM", engine.version),
    ]
    if record is None:
        return [*rows, ("record", "none: another program built it")]
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.began))
    return [
        *rows,
        ("built", f"{began}, {record.seconds:.1f} s, on {record.gpu.name} (compute capability {record.gpu.capability})"),
        ("from", f"{record.checkpoint} (manifest sha256 {record.checkpoint_sha256[:16]})"),
        ("with", ", ".join(f"{name} {version}" for name, version in record.versions.items())),
        ("command", " ".join(record.command)),
    ]


@engines.command("verify")
def engines_verify(context: typer.Context, engine: EngineName, cache_dir: CacheDir = None) -> None:
    """Compare every hash, and ask whether the engine can run on this machine; exit code 3 or 4 when it cannot."""
    from workers.engines.trtllm import engine_catalogue, node_probe, preflight
    from workers.engines.trtllm.engine_dir import read_engine_dir, verify_files

    console: Console = context.obj
    found = read_engine_dir(engine_catalogue.find(cache_folder(cache_dir), engine))
    if found.record is not None:
        console.out(f"{console.paint('ok', 'good')}    every file as it was built, {size(verify_files(found))}")
    facts = node_probe.probe(os.environ.get("PATH", os.defpath), os.environ.get("CUDA_VISIBLE_DEVICES"))
    tell_node(console, found, facts)
    faults = preflight.faults(found, found.parallel, None, facts, None)
    for note in preflight.notes(found, facts):
        console.out(f"{console.paint('?', 'warn')}     {note}")
    for fault in faults:
        console.out(f"{console.paint('no', 'bad')}    {fault}")
    if faults:
        raise faults[0]


def tell_node(console: Console, engine: EngineDir, facts: NodeFacts) -> None:
    """Print one line for each fact about this machine that suits the engine."""
    good = console.paint("ok", "good")
    if facts.installed == engine.version:
        console.out(f"{good}    tensorrt_llm {facts.installed} built it and is installed")
    for gpu in facts.gpus or ():
        if engine.record is not None and gpu.capability == engine.record.gpu.capability:
            console.out(f"{good}    GPU {gpu.index} ({gpu.name}) has the builder's compute capability {gpu.capability}")


@engines.command("rm")
def engines_rm(
    context: typer.Context,
    engine: EngineName,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    cache_dir: CacheDir = None,
) -> None:
    """Delete an engine. Replicas that run it keep what they have loaded."""
    from workers.engines.trtllm import engine_catalogue

    console: Console = context.obj
    path = engine_catalogue.find(cache_folder(cache_dir), engine)
    if not yes:
        if not console.stderr.isatty():
            raise Rejected(f"{path} was not deleted", "nobody is there to be asked", "add --yes")
        typer.confirm(f"delete {path}?", abort=True, err=True)
    console.say(f"{path}: deleted, {size(engine_catalogue.remove(path))} freed")
