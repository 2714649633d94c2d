"""From a checkpoint to an engine: checks the options, runs ``trtllm-build``, keeps its log and records the result.

Owns the builder's process and the order of writing: engines, tokenizer, log, record, rename. A folder that has a record is complete. The
checkpoint defines the layout and the quantization; the options, with the names of ``trtllm-build``, define the rest. Must never import
tensorrt_llm: only its own program does.
"""

from __future__ import annotations

import hashlib
import os
import re
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import msgspec

from workers import process
from workers.artifacts.atomic_folder import MAKE_ROOM, locked, replacing
from workers.artifacts.checkpoint import MANIFEST, Checkpoint, rank_file, read_checkpoint, verify_all
from workers.artifacts.convert import refuse_format
from workers.artifacts.hf import tokenizer_paths
from workers.artifacts.safetensors_file import FileRecord, hash_file, write_file
from workers.engines.trtllm.build_options import BuildOptions
from workers.engines.trtllm.engine_dir import (
    CONFIG,
    FORMAT,
    LOG,
    RECORD,
    BuildRecord,
    EngineDir,
    GpuFacts,
    engine_name,
    is_engine_dir,
    read_engine_dir,
)
from workers.engines.trtllm.environment import for_tool
from workers.engines.trtllm.node_probe import NodeFacts
from workers.layout.sharding import shares_embedding, trtllm_refusal
from workers.protocol.errors import ArtifactError, ConfigError, EnvironmentFault
from workers.protocol.specs import Parallel

PROGRAM = "trtllm-build"
#: Longest that a build may take, seconds: hours for the largest models.
BUILD_S = 12 * 3600.0
TICK_S = 0.5
KILL_S = 10.0
#: Number of the builder's last lines that are searched for a cause.
LAST_LINES = 200

#: Callbacks during the build: with a line of the builder's log; with (engines written, engines in all, seconds).
OnLine = Callable[[str], None]
OnTick = Callable[[int, int, float], None]


class BuildPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One build after all checks. ``key``: its name in the catalogue; equal keys make equal engines."""

    checkpoint: Checkpoint
    model: str
    options: BuildOptions
    program: str
    facts: NodeFacts
    sha256: str

    @property
    def weights(self) -> str:
        """The format of the weights: their quantization, or their number format."""
        return self.checkpoint.quant.quant_algo or self.checkpoint.facts.dtype

    @property
    def gpu(self) -> GpuFacts:
        return (self.facts.gpus or ())[0]

    @property
    def key(self) -> str:
        parallel, capability = self.checkpoint.facts.parallel, self.gpu.capability.replace(".", "")
        # Options that change only how an engine is built, not the result, are not part of the name.
        options = msgspec.structs.replace(self.options, workers=1, log_level="")
        digest = hashlib.sha256(self.sha256.encode() + msgspec.json.encode(options)).hexdigest()[:8]
        layout = f"tp{parallel.tp}-pp{parallel.pp}"
        name = f"{self.model}-{self.weights}-{layout}-sm{capability}-trtllm{self.facts.installed}-{digest}"
        return re.sub(r"[^a-z0-9._+-]+", "-", name.lower())

    def command(self, target: Path) -> list[str]:
        return command(self.program, self.checkpoint, self.options, target)


def prepare(folder: Path, options: BuildOptions, *, model: str, path: str, facts: NodeFacts) -> BuildPlan:
    """Check a checkpoint, the options and this node. ``path``: PATH's value. Reads every byte of the checkpoint.

    Raises ConfigError, ArtifactError or EnvironmentFault.
    """
    checkpoint = open_checkpoint(folder)
    options = with_defaults(checkpoint, options)
    program = find_program(path)
    if not facts.installed:
        raise EnvironmentFault(
            "TensorRT-LLM is not installed", f"{program} is there, the distribution tensorrt_llm is not", "fix the install"
        )
    if not facts.gpus:
        blind = "there is no nvidia-smi on PATH, or CUDA_VISIBLE_DEVICES names slices of GPUs"
        why = blind if facts.gpus is None else "nvidia-smi shows none"
        raise EnvironmentFault(
            "there is no GPU to build for", why, "build on a host with the GPU that is to serve: engines fit that one only"
        )
    verify_all(checkpoint)
    sha256 = hash_file(folder / MANIFEST).sha256
    return BuildPlan(checkpoint=checkpoint, model=model, options=options, program=program, facts=facts, sha256=sha256)


def open_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint that the builder can read.

    Raises :class:`ArtifactError`, or ConfigError if TensorRT-LLM cannot split it in this layout, or expects another arrangement of its
    format.
    """
    if is_engine_dir(folder):
        raise ArtifactError(f"{folder} is an engine already", "it is built from a checkpoint", "trireme engines verify looks at it")
    if not (folder / MANIFEST).is_file():
        hint = f"trireme convert {folder} -tp N -pp M --for-trtllm -o DIR makes one"
        raise ArtifactError(f"{folder} is not a checkpoint of `trireme convert`", f"it has no {MANIFEST}", hint)
    checkpoint = read_checkpoint(folder)
    facts = checkpoint.facts
    if (refusal := trtllm_refusal(facts.model, facts.parallel)) is not None:
        raise ConfigError(f"{refusal[0]} (checkpoint {folder})", "", refusal[1])
    refuse_format(checkpoint.quant, for_trtllm=True)
    if shares_embedding(facts.model, facts.parallel) and not facts.own_head:
        why = "the model ties it to the embedding, and TensorRT-LLM wants it written out"
        raise ArtifactError(f"{folder} has no lm_head.weight", why, f"trireme convert {folder} --for-trtllm -o DIR writes it")
    return checkpoint


def with_defaults(checkpoint: Checkpoint, options: BuildOptions) -> BuildOptions:
    """The options with every default that depends on the checkpoint filled in. Raises :class:`ConfigError` if they contradict it."""
    facts = checkpoint.facts
    longest = facts.model.max_position
    if options.max_seq_len > longest:
        raise ConfigError(f"--max-seq-len {options.max_seq_len} is too long", f"the model's context is {longest}", f"use {longest} or less")
    seq = options.max_seq_len or longest
    if options.max_input_len > seq:
        raise ConfigError(f"--max-input-len {options.max_input_len} is too long", f"--max-seq-len is {seq}", f"use {seq} or less")
    plain = checkpoint.quant.quant_algo is None and facts.dtype in ("fp16", "bf16")
    return msgspec.structs.replace(
        options,
        max_seq_len=seq,
        # The builder's own default, 1024, would quietly refuse longer prompts.
        max_input_len=options.max_input_len or seq,
        gemm_plugin=options.gemm_plugin or ("auto" if plain else ""),
    )


def find_program(path: str) -> str:
    """``trtllm-build`` on ``path``. Raises :class:`EnvironmentFault`."""
    program = shutil.which(PROGRAM, path=path)
    if program is None:
        why = f"{PROGRAM} is not on PATH; releases after 1.2 have none and load Hugging Face folders instead"
        raise EnvironmentFault("no engine can be built here", why, "install tensorrt_llm 1.2, or build in the image of deploy/docker")
    return program


def command(program: str, checkpoint: Checkpoint, options: BuildOptions, target: Path) -> list[str]:
    """The argument vector. No tp or pp: they come from the checkpoint's mapping."""
    words = [program, "--checkpoint_dir", str(checkpoint.folder.absolute()), "--output_dir", str(target)]
    for name, value in msgspec.structs.asdict(options).items():
        if value is True:
            words.append(f"--{name}")
        elif value not in (False, 0, ""):
            words += [f"--{name}", str(value)]
    return words


def build(
    plan: BuildPlan, target: Path, *, env: Mapping[str, str], on_line: OnLine, on_tick: OnTick, limit_s: float = BUILD_S
) -> tuple[EngineDir, bool]:
    """Build into ``target``, or reuse an earlier build of the same key there: (engine, whether it was built now).

    The builder's whole log is ``build.log`` in the folder, or next to the folder if the build fails. An engine of another key is replaced
    at the end; a folder with other content is refused.

    Raises:
        ArtifactError: the target must not be replaced, or the built engine does not match the options. EnvironmentFault: the builder failed
        or took too long, or there is no room.
    """
    with locked(target.parent / f"{target.name}.lock", limit_s, on_wait=lambda: on_tick(0, plan.checkpoint.facts.parallel.world, 0.0)):
        if (found := _built(target, plan.key)) is not None:
            return found, False
        if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not is_engine_dir(target))):
            raise ArtifactError(f"{target} exists and is not an engine", "nothing there is overwritten", "choose another folder")
        with replacing(target) as aside:
            _refuse_full_disk(plan, aside)
            began, started = time.time(), time.monotonic()
            _run(plan, aside, target.parent / f"{target.name}.log", env, on_line, on_tick, limit_s)
            _check(plan, aside)
            _record(plan, aside, began, time.monotonic() - started)
        return read_engine_dir(target), True


def _built(target: Path, key: str) -> EngineDir | None:
    """The engine of an earlier build; None if there is none, another one, or a damaged one."""
    if not (target / RECORD).is_file():
        return None
    try:
        engine = read_engine_dir(target)
    except ArtifactError:
        return None
    return engine if engine.record is not None and engine.record.key == key else None


def _refuse_full_disk(plan: BuildPlan, folder: Path) -> None:
    facts = plan.checkpoint.facts
    need = sum((plan.checkpoint.folder / rank_file(rank)).stat().st_size for rank in range(facts.parallel.world))
    free = shutil.disk_usage(folder).free
    if free < need:
        why = f"engines are about as large as the checkpoint, {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        raise EnvironmentFault(f"not enough room at {folder.parent}", why, MAKE_ROOM)


def _run(plan: BuildPlan, folder: Path, log: Path, env: Mapping[str, str], on_line: OnLine, on_tick: OnTick, limit_s: float) -> None:
    """Run the builder to its end; however it ends, no process of it is left."""
    world, deadline, started = plan.checkpoint.facts.parallel.world, time.monotonic() + limit_s, time.monotonic()
    tail: list[str] = []
    # Its timing cache, model.cache, is written to its working folder.
    with log.open("wb") as log_file, _started(plan.command(folder), folder, for_tool(env)) as builder:
        for lines in _lines(builder, log_file, deadline):
            for line in lines:
                on_line(line)
            tail = (tail + lines)[-LAST_LINES:]
            on_tick(len(list(folder.glob("rank*.engine"))), world, time.monotonic() - started)
        if builder.poll() is None:
            raise EnvironmentFault(f"{PROGRAM} did not end in {limit_s / 3600:g} h", "it was stopped", f"its log: {log}")
    if code := builder.returncode:
        how = f"was killed by {signal.Signals(-code).name} (out of memory?)" if code < 0 else f"failed with exit code {code}"
        raise EnvironmentFault(f"{PROGRAM} {how}", cause_in(tail), f"its log: {log}")
    (folder / "model.cache").unlink(missing_ok=True)
    log.replace(folder / LOG)


@contextmanager
def _started(command: list[str], folder: Path, env: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process in its own session; on exit its whole group is killed, including workers that it forked."""
    try:
        builder = subprocess.Popen(
            command, cwd=folder, env=dict(env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=process.die_with_parent,  # noqa: PLW1509 - this process has one thread when it builds
        )  # fmt: skip
    except OSError as error:
        raise EnvironmentFault(f"cannot start {command[0]}", error.strerror or str(error), "fix the install of tensorrt_llm") from None
    try:
        yield builder
    finally:
        with suppress(ProcessLookupError):
            os.killpg(builder.pid, signal.SIGKILL)
        builder.wait(KILL_S)
        if builder.stdout is not None:
            builder.stdout.close()


def _lines(builder: subprocess.Popen[bytes], log_file: IO[bytes], deadline: float) -> Iterator[list[str]]:
    """Yield the builder's output, at least a (perhaps empty) list every ``TICK_S``, until its end or the deadline."""
    assert builder.stdout is not None
    rest, readable = b"", True
    with selectors.DefaultSelector() as selector:
        selector.register(builder.stdout, selectors.EVENT_READ)
        # The end of the process counts, not of the pipe: a process that the builder left may hold the pipe open.
        while (readable or builder.poll() is None) and time.monotonic() < deadline:
            readable = bool(selector.select(TICK_S))
            data = os.read(builder.stdout.fileno(), 1 << 16) if readable else b""
            if readable and not data:
                break
            log_file.write(data)
            log_file.flush()
            *whole, rest = re.split(rb"[\r\n]+", rest + data)
            yield [line.decode(errors="replace") for line in whole if line.strip()]
    while builder.poll() is None and time.monotonic() < deadline:
        with suppress(subprocess.TimeoutExpired):
            builder.wait(TICK_S)
        yield []
    if rest.strip():
        yield [rest.decode(errors="replace")]


def cause_in(lines: list[str]) -> str:
    """The line that best explains why a builder failed: of its last lines, the last one with an error, else the last one."""
    last = [line.strip() for line in lines if line.strip()]
    errors = [line for line in last if re.search(r"error|assert|fail|out of memory", line, re.IGNORECASE)]
    return (errors or last or ["it said nothing"])[-1][:300]


def _check(plan: BuildPlan, folder: Path) -> None:
    """Compare the built engine with the requested options. Raises :class:`ArtifactError`."""
    engine, options, parallel = read_engine_dir(folder), plan.options, plan.checkpoint.facts.parallel
    pairs: list[tuple[str, object, object]] = [("layout", parallel, engine.parallel), ("version", plan.facts.installed, engine.version)]
    pairs += [(name, getattr(options, name), getattr(engine, name)) for name in ("max_batch_size", "max_num_tokens", "max_seq_len")]
    for name, asked, got in pairs:
        if asked != got:
            why = f"its {CONFIG} says {_layout_text(got)}, asked for was {_layout_text(asked)}"
            raise ArtifactError(f"{PROGRAM} built another {name} than it was told", why, "the log says why: --max-seq-len may be derived")


def _layout_text(value: object) -> str:
    return f"tp={value.tp} pp={value.pp}" if isinstance(value, Parallel) else str(value)


def _record(plan: BuildPlan, folder: Path, began: float, seconds: float) -> None:
    """Write tokenizer, hashes and the record, which completes the folder."""
    facts, checkpoint = plan.checkpoint.facts, plan.checkpoint
    files: dict[str, FileRecord] = {}
    for name, path in tokenizer_paths(checkpoint.folder).items():
        files[name] = write_file(folder / name, path.read_bytes())
    for name in (CONFIG, LOG, *(engine_name(rank) for rank in range(facts.parallel.world))):
        files[name] = _flushed(folder / name)
    record = BuildRecord(
        format=FORMAT,
        key=plan.key,
        model=plan.model,
        checkpoint=str(checkpoint.folder.absolute()),
        checkpoint_sha256=plan.sha256,
        eos_ids=facts.eos_ids,
        command=tuple(plan.command(Path("DIR"))),
        versions=plan.facts.versions,
        gpu=plan.gpu,
        began=began,
        seconds=round(seconds, 1),
        files=files,
    )
    write_file(folder / RECORD, msgspec.json.format(msgspec.json.encode(record), indent=2))


def _flushed(path: Path) -> FileRecord:
    """Hash a file that another program wrote, once it is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return hash_file(path)
