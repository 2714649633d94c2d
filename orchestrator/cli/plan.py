"""`trireme plan`: what a deployment file needs and gives, before anything is started. Works without a GPU, Ray, MPI or weights.

Owns the names of devices in flags. What fits and how fast it is belongs to `orchestrator.planner.planner`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from orchestrator.cli.console import Console, Progress
from workers.protocol.errors import ArtifactError, ConfigError, Rejected

if TYPE_CHECKING:
    from orchestrator.config.deployment_file import Config
    from orchestrator.planner.automatic import ClusterHardware, ModelDescription
    from orchestrator.planner.cluster import PlannedCluster
    from orchestrator.planner.planner import Subject, SubjectPlan
    from workers.protocol.specs import QuantName

_UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def plan(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A deployment file.")],
    gpus: Annotated[str, typer.Option("--gpus", metavar="8xH100[,nodes=2]", help="GPUs on each node: H100, H200, A100, L40S.")] = "",
    cpus: Annotated[
        str, typer.Option("--cpus", metavar="2[,nodes=1][,memory=16GB]", help="CPUs on each node; by default this host's.")
    ] = "",
    model: Annotated[str, typer.Option("--model", help="A folder, known shape or hub id to use instead of the file's paths.")] = "",
    isl: Annotated[int, typer.Option("--isl", min=1, help="Prompt tokens of a request.")] = 512,
    osl: Annotated[int, typer.Option("--osl", min=1, help="Output tokens of a request.")] = 256,
    form: Annotated[str, typer.Option("--output", "-o", metavar="table|json")] = "table",
    render: Annotated[str, typer.Option("--render", metavar="slurm|ray|kubernetes", help="Print the job of this size instead.")] = "",
) -> None:
    """Print whether a deployment fits, on which layouts, and how fast it would be; exit code 3 if its own layout does not fit."""
    from orchestrator.cli import plan_render, plan_tables
    from orchestrator.config import deployment_file
    from orchestrator.planner import planner
    from orchestrator.planner.cost_model import Workload

    console: Console = context.obj
    if form not in ("table", "json"):
        raise Rejected(f"--output {form} is not a format", hint="use table or json")
    if render not in ("", *plan_render.KINDS):
        raise Rejected(f"--render {render} is not a kind of job", hint=f"use {', '.join(plan_render.KINDS)}")
    settings = deployment_file.load(file, env=os.environ).config
    load = Workload(name="asked", requests=1, isl=isl, osl=osl)
    plans: list[tuple[SubjectPlan, PlannedCluster]] = []
    with console.progress() as progress:
        groups = _by_device(subjects(settings, _hardware(gpus), model, progress))
    if gpus and groups and "cuda" not in groups:
        raise ConfigError(f"--gpus {gpus} says nothing about {file}", "its models run on CPUs", "leave device out of it, or say cuda")
    for device, some in groups.items():
        cluster = gpu_cluster(gpus, settings) if device == "cuda" else host_cluster(cpus, some)
        plans += ((each, cluster) for each in planner.plan(some, cluster, load))
    if not plans:
        raise ConfigError(f"{file} has nothing to plan", "only fake engines, which take no memory", "plan a file with a real engine")
    refusal = next((each.refusal for each, _ in plans if each.refusal), None)
    if render:
        if refusal:
            raise refusal
        if len({cluster for _, cluster in plans}) > 1:
            raise ConfigError(f"{file} runs on GPUs and on CPUs", "a job asks for nodes of one kind", "give each kind a file of its own")
        console.out(plan_render.job(render, file, settings, [each.subject for each, _ in plans], plans[0][1]), end="")
        return
    if form == "json":
        console.out(json.dumps({"models": [plan_tables.facts(each, cluster, load) for each, cluster in plans]}, indent=2))
    else:
        console.out("\n\n".join(plan_tables.render(each, cluster, load) for each, cluster in plans))
    if refusal:
        raise refusal


def _hardware(gpus: str) -> ClusterHardware:
    """The hardware for automatic settings: the GPUs of the flag; without it, this host's CPUs."""
    from orchestrator.control.launch import node_hardware
    from orchestrator.planner.automatic import ClusterHardware, GpuHardware, NodeHardware
    from workers.protocol.specs import GPU_MIN_CAPABILITY

    if not gpus:
        # Without --gpus the target is unknown: a file that needs GPUs is not refused because this host has none.
        return ClusterHardware(nodes=(node_hardware.look(os.environ, gpus=False),), grows=True)
    cluster = parse_gpus(gpus)
    gpu = GpuHardware(name=cluster.device.name, memory=cluster.device.memory, capability=GPU_MIN_CAPABILITY)
    return ClusterHardware(nodes=(NodeHardware(gpus=(gpu,) * cluster.slots),) * cluster.nodes)


def subjects(
    settings: Config, hardware: ClusterHardware, stand_in: str = "", progress: Progress = lambda phase, done, total: None
) -> list[Subject]:
    """The demand of a deployment on ``hardware``; gangs of one model with the same settings are grouped. ``stand_in``: the model to use
    instead of each path. For a hub's model only the description is fetched, not the weights, except for a GGUF.

    Raises what reading a model's description raises.
    """
    from orchestrator.planner.automatic import engine_for, smallest_layout
    from orchestrator.planner.planner import Subject

    found: list[Subject] = []
    for model in settings.models:
        groups: dict[tuple[str, bytes], list[int]] = {}
        gangs = model.gangs()
        for index, gang in enumerate(gangs):
            alike = msgspec.structs.replace(gang, name="", tp_size=1, pp_size=1)
            groups.setdefault((gang.path, msgspec.msgpack.encode(alike)), []).append(index)
        for indices in groups.values():
            first = gangs[indices[0]]
            if first.engine == "fake":
                continue
            described = _description(stand_in or first.path, first.settings.portable.quant, settings.cache, progress)
            assert described.shape is not None
            engine = engine_for(first, described, hardware)
            layouts = (gangs[index].layout or smallest_layout(gangs[index], described, hardware) for index in indices)
            found.append(
                Subject(
                    name=model.name if len(groups) == 1 else f"{model.name} ({first.name})",
                    model=described.shape,
                    quant=described.quant,
                    engine=engine,
                    gangs=tuple((gangs[index].name, layout) for index, layout in zip(indices, layouts, strict=True)),
                    cpus_per_rank=model.cpus_per_rank,
                    spread=model.spread,
                )
            )
    return found


def _description(name: str, form: QuantName | None, cache: Path, progress: Progress) -> ModelDescription:
    """A model with weights in ``form``: read from its folder, known by name, or read from a hub."""
    from orchestrator.hub.reference import parse
    from orchestrator.model_store import locate
    from orchestrator.planner.automatic import ModelDescription
    from orchestrator.planner.known_models import SHAPES
    from workers.artifacts.artifact import open_artifact, quant_for
    from workers.engines.trtllm.engine_dir import is_engine_dir
    from workers.protocol.specs import PLAIN, quant_of

    path = Path(name).expanduser()
    if not path.exists() and name.lower() not in SHAPES and parse(name):
        path = locate(name, cache, progress, weights=False)
    if path.exists():
        if is_engine_dir(path):
            raise ArtifactError(f"{path} is a built engine", "its layout and limits are settled", "give its checkpoint with --model")
        artifact = open_artifact(path, weights_optional=True)
        return ModelDescription(shape=artifact.model, quant=quant_for(artifact, form), dtype=artifact.dtype)
    if name.lower() not in SHAPES:
        why = f"no file or folder is there, and shapes known by name are: {', '.join(SHAPES)}"
        raise ArtifactError(f"there is no model at {name}", why, "give one of them, a folder with a config.json, or a hub id, with --model")
    return ModelDescription(shape=SHAPES[name.lower()], quant=PLAIN if form is None else quant_of(form), dtype="bf16")


def _by_device(some: Sequence[Subject]) -> dict[str, list[Subject]]:
    found: dict[str, list[Subject]] = {}
    for subject in some:
        found.setdefault(subject.engine.device, []).append(subject)
    return found


def gpu_cluster(text: str, settings: Config) -> PlannedCluster:
    """The GPUs of the flag. Raises as :func:`parse_gpus`, and :class:`ConfigError` if the flag is missing."""
    if not text:
        raise ConfigError(f"{settings.name} runs on GPUs", "which ones is not said", "add --gpus, such as --gpus 8xH100,nodes=2")
    return parse_gpus(text)


def parse_gpus(text: str) -> PlannedCluster:
    """``8xH100,nodes=2``. Raises :class:`Rejected` for an invalid text."""
    from orchestrator.planner.cluster import PlannedCluster
    from orchestrator.planner.devices import GPUS

    first, options = _words("--gpus", text, {"nodes"})
    count, cross, kind = first.partition("x")
    known = {name.lower(): gpu for name, gpu in GPUS.items()}
    if not cross or kind.lower() not in known:
        raise Rejected(f"--gpus {text}: {kind or first} is not a known GPU", "", f"write COUNTxKIND; kinds are {', '.join(GPUS)}")
    return PlannedCluster(device=known[kind.lower()], nodes=_count("--gpus", options.get("nodes", "1")), slots=_count("--gpus", count))


def host_cluster(text: str, some: Sequence[Subject]) -> PlannedCluster:
    """``2,nodes=1,memory=16GB``; missing values are this host's, where a deployment's own Ray gives each rank a share, even if there are
    fewer cores than ranks."""
    import psutil

    from orchestrator.planner.cluster import PlannedCluster
    from orchestrator.planner.devices import HostModel

    here = len(os.sched_getaffinity(0))
    first, options = _words("--cpus", text, {"nodes", "memory"}) if text else (str(here), {})
    memory = _bytes(options["memory"]) if "memory" in options else int(psutil.virtual_memory().available)
    cores = _count("--cpus", first)
    shares = 0 if text else ceil(sum(subject.cpus_per_rank * layout.world for subject in some for _, layout in subject.gangs))
    device = HostModel(memory=memory, cores=cores)
    return PlannedCluster(device=device, nodes=_count("--cpus", options.get("nodes", "1")), slots=max(cores, shares))


def _words(flag: str, text: str, known: set[str]) -> tuple[str, dict[str, str]]:
    first, *rest = text.split(",")
    options = {name: value for name, _, value in (word.partition("=") for word in rest)}
    if unknown := options.keys() - known:
        allowed = " and ".join(f"{name}=" for name in sorted(known, reverse=True))
        raise Rejected(f"{flag} {text}: {min(unknown)!r} is not known", "", f"after the first comma may follow {allowed}")
    return first, options


def _count(flag: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 65536:
        raise Rejected(f"{flag}: {text!r} is not a count", "", f"{flag} {'8xH100' if flag == '--gpus' else '2'},nodes=2")
    return int(text)


def _bytes(text: str) -> int:
    number = text.rstrip("kKMGTiB")
    unit = text[len(number) :]
    try:
        return int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise Rejected(f"--cpus: memory={text} is not a size", "", "write 16GB or 16GiB") from None
