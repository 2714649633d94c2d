"""`trireme build` and `trireme engines`: TensorRT-LLM engines made from checkpoints, and what became of them.

Owns what people see of a build. The work, and every refusal, belongs to `workers.engines.trtllm`.
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli.console import Console, age, size, table
from orchestrator.cli.options import CacheDir, cache_folder
from workers.protocol.errors import Rejected

if TYPE_CHECKING:
    from workers.engines.trtllm.engine_catalogue import CatalogueEntry
    from workers.engines.trtllm.engine_dir import EngineDir
    from workers.engines.trtllm.node_probe import NodeFacts

engines = typer.Typer(name="engines", help="The TensorRT-LLM engines that were built here.", no_args_is_help=True)

EngineName = Annotated[str, typer.Argument(metavar="ENGINE", help="Its name (or the beginning of it), or its folder.")]
Form = Annotated[str, typer.Option("--output", "-o", metavar="text|json")]


def with_build_options(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with a flag for every option that `workers.engines.trtllm.build_options` knows; they arrive as ``given``, by name."""
    from workers.engines.trtllm.build_options import options

    own = [each for each in inspect.signature(command, eval_str=True).parameters.values() if each.name != "given"]
    flags = []
    for option in options():
        shown = "|".join(map(str, option.choices)) or None
        told = option.text if option.kind is bool or not option.default else f"{option.text} (default {option.default})"
        words = typer.Option(option.flag, metavar=shown, help=told, rich_help_panel="Options of trtllm-build")
        kind = Annotated[option.kind | None, words]  # type: ignore[name-defined]
        flags.append(inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))

    def wrapped(**values: Any) -> None:
        command(**{each.name: values.pop(each.name) for each in own}, given=values)

    keyword = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own]
    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    wrapped.__signature__ = inspect.Signature([*keyword, *flags])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {each.name: each.annotation for each in (*keyword, *flags)}
    return wrapped


def build(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="A folder that `trireme convert --for-trtllm` wrote.")],
    given: dict[str, Any],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write; the catalogue's own when not given.")] = None,
    name: Annotated[str, typer.Option("--name", help="What the model is called in the catalogue; the checkpoint's folder name.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, and print the command; needs no GPU.")] = False,
    cache_dir: CacheDir = None,
) -> None:
    """Build TensorRT-LLM engines from a checkpoint; the same build a second time is found, not made.

    Layout and quantization are the checkpoint's. Needs TensorRT-LLM 1.2 and the GPU that is to serve.
    """
    from workers.engines.trtllm import build as building
    from workers.engines.trtllm import engine_catalogue, node_probe
    from workers.engines.trtllm.build_options import from_flags

    console: Console = context.obj
    options, path = from_flags(given), os.environ.get("PATH", os.defpath)
    model = name or checkpoint.absolute().name
    if dry_run:
        found = building.open_checkpoint(checkpoint)
        words = building.command(building.PROGRAM, found, building.with_defaults(found, options), output or Path("DIR"))
        console.out(" ".join(words))
        return
    facts = node_probe.probe(path, os.environ.get("CUDA_VISIBLE_DEVICES"))
    plan = building.prepare(checkpoint, options, model=model, path=path, facts=facts)
    target = output or engine_catalogue.folder(cache_folder(cache_dir)) / plan.key
    tell_unproven(console, plan)
    console.say(f"{plan.key}: {plan.gpu.name}, tensorrt_llm {plan.facts.installed}")
    with console.following() as follower, terminable():
        engine, fresh = building.build(
            plan,
            target,
            env=os.environ,
            on_line=follower.line,
            on_tick=lambda done, total, seconds: follower.state(f"build: {done} of {total} engines written, {seconds:.0f} s"),
        )
    seconds = engine.record.seconds if engine.record is not None else 0.0
    how = f"built in {seconds:.1f} s" if fresh else "found, built before"
    total = sum(engine.engine_bytes(rank) for rank in range(engine.world))
    told = f"{engine.world} engines, {size(total)}, {how}"
    console.say(told, path=str(target), key=plan.key, built=fresh, seconds=seconds)
    console.out(str(target))


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM means what Ctrl-C does: the builder's processes end with this one."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def tell_unproven(console: Console, plan: Any) -> None:
    """Say what of this model TensorRT-LLM's published checkpoint format has no word for."""
    model = plan.checkpoint.facts.model
    odd = [
        what
        for what, there in (
            ("quantized weights", plan.checkpoint.quant.quant_algo is not None),
            ("rope scaling", model.rope_scaling is not None),
            ("q/k/v biases", model.qkv_bias),
            ("q/k norms", model.qk_norm),
        )
        if there
    ]
    if odd:
        console.warn(f"{' and '.join(odd)} in TensorRT-LLM checkpoints are unproven here: compare with `trireme verify` before serving")


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
    """An engine's facts in the order of the list's columns, the first and the last of them left out."""
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
    limits = f"{engine.max_batch_size} rows, {engine.max_num_tokens} tokens a step, {engine.max_seq_len} a sequence"
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
    """What is right about this machine, a line each."""
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


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(with_build_options(build))
    app.add_typer(engines)
