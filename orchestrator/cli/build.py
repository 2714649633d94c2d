"""`trireme build`: TensorRT-LLM engines made from a checkpoint.

Owns the output of the command. The work and every refusal belong to `workers.engines.trtllm`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from msgspec.structs import asdict

from orchestrator.cli.console import Console, size
from orchestrator.cli.model_options import CacheDir, cache_folder
from orchestrator.cli.option_structs import with_option_structs


def build_flags() -> type[msgspec.Struct]:
    """A struct with a flag for every option that `workers.engines.trtllm.build_options` knows."""
    from workers.engines.trtllm.build_options import options

    fields: list[tuple[str, Any, None]] = []
    for option in options():
        text = option.text if option.kind is bool or not option.default else f"{option.text} (default {option.default})"
        choices = "|".join(map(str, option.choices)) or None
        flag = typer.Option(option.flag, metavar=choices, help=text, rich_help_panel="Options of trtllm-build")
        fields.append((option.name, Annotated[option.kind | None, flag], None))
    return msgspec.defstruct("BuildFlags", fields, frozen=True, kw_only=True)


BuildFlags = build_flags()


@with_option_structs
def build(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="A folder that `trireme convert --for-trtllm` wrote.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write; by default one in the catalogue.")] = None,
    name: Annotated[str, typer.Option("--name", help="Name of the model in the catalogue; by default the checkpoint's folder name.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the options and print the command; needs no GPU.")] = False,
    cache_dir: CacheDir = None,
    *,
    flags: BuildFlags,  # type: ignore[valid-type]
) -> None:
    """Build TensorRT-LLM engines from a checkpoint; a second build with the same options reuses them.

    Layout and quantization are the checkpoint's. Needs TensorRT-LLM 1.2 and a GPU of the kind that will serve.
    """
    from workers.engines.trtllm import build as building
    from workers.engines.trtllm import engine_catalogue, node_probe
    from workers.engines.trtllm.build_options import from_flags

    console: Console = context.obj
    options, path = from_flags(asdict(flags)), os.environ.get("PATH", os.defpath)
    model = name or checkpoint.absolute().name
    if dry_run:
        found = building.open_checkpoint(checkpoint)
        command = building.command(building.PROGRAM, found, building.with_defaults(found, options), output or Path("DIR"))
        console.out(" ".join(command))
        return
    facts = node_probe.probe(path, os.environ.get("CUDA_VISIBLE_DEVICES"))
    plan = building.prepare(checkpoint, options, model=model, path=path, facts=facts)
    target = output or engine_catalogue.folder(cache_folder(cache_dir)) / plan.key
    warn_unproven(console, plan)
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
    summary = f"{engine.world} engines, {size(total)}, {how}"
    console.say(summary, path=str(target), key=plan.key, built=fresh, seconds=seconds)
    console.out(str(target))


@contextmanager
def terminable() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C, so that the builder's processes end with this one."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def warn_unproven(console: Console, plan: Any) -> None:
    """Warn of features of this model that TensorRT-LLM's published checkpoint format does not describe."""
    model = plan.checkpoint.facts.model
    unproven = [
        what
        for what, there in (
            ("quantized weights", plan.checkpoint.quant.quant_algo is not None),
            ("rope scaling", any(rope.scaling is not None for rope in model.ropes)),
            ("q/k/v biases", any(kind.attention.qkv_bias for kind in model.kinds)),
            ("q/k norms", any(kind.attention.qk_norm for kind in model.kinds)),
        )
        if there
    ]
    if unproven:
        console.warn(
            f"{' and '.join(unproven)} in TensorRT-LLM checkpoints are unproven here: compare with `trireme verify` before serving"
        )
