"""TensorRT-LLM engine folders: ``config.json``, ``rank<N>.engine``, and ``trireme.json``, the record that `trireme build` writes.

Owns the reading of such a folder and the record's format. ``config.json`` belongs to TensorRT-LLM: only the keys that matter here are read,
and other keys may have any value. The record is written last, so a folder that has one is complete. Must never load an engine or import
tensorrt_llm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from workers.artifacts.hf import read_eos
from workers.artifacts.json_file import decode
from workers.artifacts.safetensors_file import FileRecord, hash_file
from workers.protocol.errors import ArtifactError
from workers.protocol.specs import Parallel, Quant

CONFIG, RECORD, LOG = "config.json", "trireme.json", "build.log"
FORMAT = 1
#: The hint for a folder that cannot be trusted.
AGAIN = "run `trireme build` again on its checkpoint"


class GpuFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU of a node. ``capability``: compute capability as NVIDIA writes it (``9.0``). Memory in bytes."""

    index: int
    name: str
    capability: str
    memory: int
    free: int
    driver: str = ""


class BuildRecord(msgspec.Struct, frozen=True, kw_only=True):
    """``trireme.json``: where an engine came from.

    ``key``: name in the catalogue. ``checkpoint_sha256``: of the checkpoint's manifest, which holds the hashes of all its files.
    ``versions``: distribution -> version at build time. ``began``: Unix time; ``seconds`` that the builder took. ``files``: every other
    file.
    """

    format: int
    key: str
    model: str
    checkpoint: str
    checkpoint_sha256: str
    eos_ids: tuple[int, ...]
    command: tuple[str, ...]
    versions: dict[str, str]
    gpu: GpuFacts
    began: float
    seconds: float
    files: dict[str, FileRecord]


class EngineDir(msgspec.Struct, frozen=True, kw_only=True):
    """An engine folder whose config, rank files and record (if there is one) agree. Limits: sequences, tokens.

    ``eos_ids``: empty if it has none. ``tokenizer_dir``: folder with ``tokenizer.json``, None without one. ``record``: None for an engine
    that another program built: then its GPU and its hashes are unknown.
    """

    path: Path
    version: str
    parallel: Parallel
    world: int
    vocab_size: int
    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    max_input_len: int
    max_beam_width: int
    tokens_per_block: int
    dtype: str
    quant: Quant
    paged_kv_cache: bool
    paged_context_fmha: bool
    eos_ids: tuple[int, ...]
    tokenizer_dir: Path | None
    record: BuildRecord | None

    def engine_file(self, rank: int) -> Path:
        return self.path / engine_name(rank)

    def engine_bytes(self, rank: int) -> int:
        return self.engine_file(rank).stat().st_size


class _Mapping(msgspec.Struct):
    world_size: int = 1
    tp_size: int = 1
    pp_size: int = 1
    cp_size: int = 1


class _Quantization(msgspec.Struct):
    quant_algo: str | None = None
    kv_cache_quant_algo: str | None = None


class _Pretrained(msgspec.Struct, kw_only=True):
    dtype: str
    vocab_size: int
    max_position_embeddings: int | None = None
    mapping: _Mapping = msgspec.field(default_factory=_Mapping)
    quantization: _Quantization | None = None


class _Plugins(msgspec.Struct):
    tokens_per_block: int = 32
    use_paged_context_fmha: bool = True


class _Build(msgspec.Struct):
    """Defaults are those of ``tensorrt_llm.BuildConfig``."""

    max_batch_size: int = 2048
    max_num_tokens: int = 8192
    max_input_len: int = 1024
    max_seq_len: int | None = None
    max_beam_width: int = 1
    kv_cache_type: str | None = None
    plugin_config: _Plugins = msgspec.field(default_factory=_Plugins)


class _Config(msgspec.Struct):
    version: str
    pretrained_config: _Pretrained
    build_config: _Build


def engine_name(rank: int) -> str:
    return f"rank{rank}.engine"


def is_engine_dir(path: str | Path) -> bool:
    """Whether a folder has the record of a build, or a ``config.json`` that is an engine's; :func:`read_engine_dir` says what is wrong."""
    file = Path(path) / CONFIG
    if (Path(path) / RECORD).is_file():
        return True
    if not file.is_file():
        return False
    try:
        return {"pretrained_config", "build_config"} <= decode(file, dict[str, Any]).keys()
    except ArtifactError:
        return False


def read_engine_dir(path: str | Path) -> EngineDir:
    """Read an engine folder and cross-check it; of engine files only names and sizes are checked.

    Raises :class:`ArtifactError` naming the file that is missing, damaged or contradicts the others.
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        raise ArtifactError(f"{path} holds no TensorRT-LLM engine", f"it has no {CONFIG}", "give a folder that `trireme build` made")
    config = decode(path / CONFIG, _Config)
    mapping, build, model = config.pretrained_config.mapping, config.build_config, config.pretrained_config
    if mapping.cp_size != 1 or mapping.world_size != mapping.tp_size * mapping.pp_size:
        why = f"tp={mapping.tp_size} pp={mapping.pp_size} cp={mapping.cp_size}, world {mapping.world_size}"
        raise ArtifactError(f"{path} is laid out in a way that is not served here", why, "build it for tp x pp ranks")
    record = _read_record(path)
    parallel = Parallel(tp=mapping.tp_size, pp=mapping.pp_size)
    _check_files(path, parallel, record)
    longest = build.max_seq_len or model.max_position_embeddings
    if not longest:
        raise ArtifactError(f"{path / CONFIG} does not say how long a sequence may be", "build_config.max_seq_len is null", AGAIN)
    quantization = model.quantization or _Quantization()
    return EngineDir(
        path=path,
        version=config.version,
        parallel=parallel,
        world=parallel.world,
        vocab_size=model.vocab_size,
        max_batch_size=build.max_batch_size,
        max_num_tokens=build.max_num_tokens,
        max_seq_len=longest,
        max_input_len=min(build.max_input_len, longest),
        max_beam_width=build.max_beam_width,
        tokens_per_block=build.plugin_config.tokens_per_block,
        dtype=model.dtype,
        quant=Quant(quant_algo=quantization.quant_algo, kv_cache_quant_algo=quantization.kv_cache_quant_algo),
        # A missing key means the default, which is paged.
        paged_kv_cache=(build.kv_cache_type or "paged").lower().endswith("paged"),
        paged_context_fmha=build.plugin_config.use_paged_context_fmha,
        eos_ids=record.eos_ids if record is not None else read_eos(path),
        tokenizer_dir=path if (path / "tokenizer.json").is_file() else None,
        record=record,
    )


def _read_record(path: Path) -> BuildRecord | None:
    if not (path / RECORD).is_file():
        return None
    record = decode(path / RECORD, BuildRecord)
    if record.format != FORMAT:
        raise ArtifactError(f"{path / RECORD} has format {record.format}", f"this version reads {FORMAT}", AGAIN)
    if CONFIG not in record.files or hash_file(path / CONFIG) != record.files[CONFIG]:
        raise ArtifactError(f"{path / CONFIG} is not the one of its build", f"its hash differs from the one in {RECORD}", AGAIN)
    return record


def _check_files(path: Path, parallel: Parallel, record: BuildRecord | None) -> None:
    """Check that there is exactly one engine per rank, with the size that it had after the build."""
    wanted, found = {engine_name(rank) for rank in range(parallel.world)}, {file.name for file in path.glob("rank*.engine")}
    layout = f"tp={parallel.tp} pp={parallel.pp}"
    if missing := sorted(wanted - found):
        why = f"{layout} needs {parallel.world} engines, {len(wanted & found)} of them are there"
        raise ArtifactError(f"{path / missing[0]} is missing", why, f"copy the folder again, or {AGAIN}")
    if strange := sorted(found - wanted):
        raise ArtifactError(f"{path / strange[0]} belongs to another layout", f"{layout} has {parallel.world} engines", AGAIN)
    for name in sorted(wanted):
        size = (path / name).stat().st_size
        if not size:
            raise ArtifactError(f"{path / name} is empty", "its build or its copy was cut short", AGAIN)
        expected = record.files[name].bytes if record is not None and name in record.files else size
        if size != expected:
            raise ArtifactError(f"{path / name} has another size than when it was built", f"expected {expected} bytes, got {size}", AGAIN)


def verify_files(engine: EngineDir) -> int:
    """Read every recorded file and compare its hash; the number of bytes read.

    Raises :class:`ArtifactError` naming the file that differs, or if the folder has no record to compare with.
    """
    if engine.record is None:
        raise ArtifactError(f"{engine.path} has no {RECORD}", "another program built it: there are no hashes to compare with", AGAIN)
    total = 0
    for name, expected in engine.record.files.items():
        got = hash_file(engine.path / name)
        if got != expected:
            raise ArtifactError(f"{engine.path / name} is damaged", f"expected sha256 {expected.sha256}, got {got.sha256}", AGAIN)
        total += got.bytes
    return total
