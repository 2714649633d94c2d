"""TensorRT-LLM checkpoints: ``config.json``, ``rank<N>.safetensors``, tokenizer files, and a manifest of hashes and sizes.

Owns the folder's format. ``config.json`` has TensorRT-LLM's own keys; the key ``trireme`` holds what the portable engine needs beside them.
This reader uses ``trireme``, after checking that the other keys agree with it. The manifest is written last, so a folder that has one is
complete. A folder with neither was written by TensorRT-LLM's own converters: it has no hashes, and its embedding may be split in another
way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from workers.artifacts.hf import read_eos
from workers.artifacts.json_file import decode
from workers.artifacts.nvidia_config import EmbeddingCut, read_config
from workers.artifacts.safetensors_file import NAMES, FileRecord, SafetensorsFile, hash_file
from workers.artifacts.source import Block, cut
from workers.layout.declaration import EMBEDDING, HEAD, VOCAB_EMBEDDING
from workers.layout.quant_parts import StoredTensor, stored_tensors
from workers.layout.sharding import ModelTensor, ShardPiece, ShardTensor, Span, deal, heads_of
from workers.models.registry import FAMILIES, trtllm_gap, trtllm_model
from workers.protocol.errors import ArtifactError, ConfigError
from workers.protocol.specs import DType, LinearScaling, Llama3Scaling, ModelSpec, Parallel, Quant

FORMAT = 3
CONFIG = "config.json"
MANIFEST = "manifest.json"
#: Tensors in files of TensorRT-LLM's converters that follow from the config, or are for a quantized KV cache.
_NVIDIAS_EXTRAS = ("rotary_inv_freq", "embed_positions", "embed_positions_for_gpt_attention", "kv_cache_scaling_factor")
#: Hint for a folder that is damaged or incomplete.
CONVERT_AGAIN = "convert or copy it again (in the cache: delete the folder, and it is made again)"
DTYPE_NAMES: dict[DType, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class CheckpointFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The key ``trireme`` of ``config.json``. ``heads``: for each tp rank its query heads and its key/value heads.

    ``own_head``: a tied ``lm_head.weight`` is stored although its stage has the embedding (as TensorRT-LLM wants it).
    """

    format: int
    model: ModelSpec
    dtype: DType
    parallel: Parallel
    heads: tuple[tuple[Span, Span], ...]
    eos_ids: tuple[int, ...]
    own_head: bool = False

    def __post_init__(self) -> None:
        self.parallel.check(self.model)


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``manifest.json``: every other file of the folder."""

    format: int
    files: dict[str, FileRecord]


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint folder whose config has been read. ``manifest``: agrees with the config; None where TensorRT-LLM's own converter wrote
    the folder. ``embedding``: how the ranks of the first stage share it."""

    folder: Path
    facts: CheckpointFacts
    quant: Quant
    manifest: Manifest | None
    embedding: EmbeddingCut = "rows"

    def stored(self, rank: int) -> tuple[StoredTensor, ...]:
        """The tensors in the file of ``rank``."""
        found = stored(self.facts, self.quant, rank)
        if self.embedding == "rows":
            return found
        cut = ShardTensor(name=VOCAB_EMBEDDING, **self._embedding_of(rank))
        return tuple(msgspec.structs.replace(each, tensor=cut) if each.tensor.name == VOCAB_EMBEDDING else each for each in found)

    def _embedding_of(self, rank: int) -> dict[str, Any]:
        model, parallel = self.facts.model, self.facts.parallel
        columns = self.embedding == "columns"
        whole = ModelTensor(name=EMBEDDING, shape=(model.vocab_size, model.hidden_size), axis=int(columns))
        span = deal(model.hidden_size, parallel.tp, parallel.tp_rank(rank)) if columns else Span(0, model.vocab_size)
        piece = ShardPiece(tensor=whole, span=span)
        return {"shape": piece.shape, "pieces": (piece,)}


class _Config(msgspec.Struct, kw_only=True):
    trireme: CheckpointFacts
    quantization: Quant | None = None


def describe(model: ModelSpec, parallel: Parallel, dtype: DType, eos_ids: tuple[int, ...], *, for_trtllm: bool = False) -> CheckpointFacts:
    """The facts of a checkpoint to be written; a model with a sliding window becomes one with the length of its window.

    Raises :class:`~workers.protocol.errors.ConfigError` when the model cannot be split this way, or the format cannot describe it.
    """
    parallel.check(model)
    model = trtllm_model(model)
    if gap := trtllm_gap(model):
        raise ConfigError(
            "this model cannot become a TensorRT-LLM checkpoint", gap, "serve its folder or file directly: the portable engine reads it"
        )
    heads = tuple(heads_of(model, parallel.tp, tp_rank) for tp_rank in range(parallel.tp))
    facts = {"model": model, "parallel": parallel, "dtype": dtype, "eos_ids": eos_ids, "heads": heads}
    return CheckpointFacts(format=FORMAT, own_head=for_trtllm and model.tied_embeddings, **facts)  # type: ignore[arg-type]


def stored(facts: CheckpointFacts, quant: Quant, rank: int) -> tuple[StoredTensor, ...]:
    """The tensors in the file of ``rank``. Raises ConfigError if a quantization group would be split between two ranks."""
    return stored_tensors(facts.model, facts.parallel, rank, dtype=facts.dtype, quant=quant, own_head=facts.own_head)


def config_of(facts: CheckpointFacts, quant: Quant) -> dict[str, Any]:
    """``config.json``, without the key ``trireme``: what TensorRT-LLM 1.2 reads, every default that matters written out."""
    model, parallel = facts.model, facts.parallel
    config: dict[str, Any] = {
        "architecture": FAMILIES[model.architecture].trtllm,
        "dtype": DTYPE_NAMES[facts.dtype],
        "logits_dtype": "float32",
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_size": model.head_dim,
        "hidden_act": "silu",
        "intermediate_size": model.widest_mlp,
        "norm_epsilon": model.rms_norm_eps,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": model.ropes[0].theta,
        "rotary_scaling": _rotary_scaling(model),
        "attn_bias": model.kinds[0].attention.qkv_bias,
        "tie_word_embeddings": model.tied_embeddings,
        "use_parallel_embedding": parallel.tp > 1,
        "embedding_sharding_dim": 0,
        "mapping": {"world_size": parallel.world, "tp_size": parallel.tp, "pp_size": parallel.pp},
        "quantization": _quantization(quant),
    }
    if model.architecture in ("qwen2", "qwen3"):
        config |= {"qwen_type": model.architecture, "seq_length": model.max_position}
    return config


def _quantization(quant: Quant) -> dict[str, Any]:
    keys: dict[str, Any] = {"quant_algo": quant.quant_algo, "kv_cache_quant_algo": quant.kv_cache_quant_algo}
    if quant.quant_algo is not None:
        keys |= {key: value for key, value in msgspec.to_builtins(quant).items() if value is not None}
    return keys


def _rotary_scaling(model: ModelSpec) -> dict[str, Any] | None:
    match scaling := model.ropes[0].scaling:
        case LinearScaling():
            return {"type": "linear", "factor": scaling.factor}
        case Llama3Scaling():
            return {
                "type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position,
            }
    return None


def rank_file(rank: int) -> str:
    return f"rank{rank}.safetensors"


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read config and manifest and compare them; of the weights only names and sizes are checked.

    Raises :class:`ArtifactError` naming the file that is missing, damaged or contradictory.
    """
    if not (folder / MANIFEST).is_file():
        return _read_nvidias(folder)
    manifest = decode(folder / MANIFEST, Manifest)
    if CONFIG not in manifest.files:
        raise ArtifactError(f"{folder / MANIFEST} does not list {CONFIG}", "every checkpoint has one", CONVERT_AGAIN)
    verify(folder, manifest, CONFIG)
    raw = decode(folder / CONFIG, dict[str, Any])
    own = raw.get("trireme")
    if own is None:
        raise ArtifactError(
            f"{folder / CONFIG} has no key 'trireme'", "another converter wrote it", "run `trireme convert` on the original"
        )
    # The format is read first, because another format has other keys.
    if (stored := own.get("format") if isinstance(own, dict) else None) != FORMAT or manifest.format != FORMAT:
        why = "another version of trireme wrote it"
        raise ArtifactError(
            f"{folder} has format {stored}, this version reads {FORMAT}", why, "run `trireme convert` on the original model"
        )
    config = decode(folder / CONFIG, _Config)
    facts = config.trireme
    if facts != describe(facts.model, facts.parallel, facts.dtype, facts.eos_ids, for_trtllm=facts.own_head):
        raise ArtifactError(
            f"{folder / CONFIG} contradicts itself", f"heads are {facts.heads}, its model and layout mean others", CONVERT_AGAIN
        )
    quant = config.quantization or Quant()
    for key, value in config_of(facts, quant).items():
        if raw.get(key) != value and key != "quantization":
            raise ArtifactError(
                f"{folder / CONFIG} contradicts itself", f"{key} is {raw.get(key)!r}, its key 'trireme' means {value!r}", CONVERT_AGAIN
            )
    for rank in range(facts.parallel.world):
        name = rank_file(rank)
        if name not in manifest.files:
            raise ArtifactError(
                f"{folder / MANIFEST} does not list {name}", f"tp={facts.parallel.tp} pp={facts.parallel.pp} needs it", CONVERT_AGAIN
            )
        check_size(folder, manifest, name)
    return Checkpoint(folder=folder, facts=facts, quant=quant, manifest=manifest)


def _read_nvidias(folder: Path) -> Checkpoint:
    raw = decode(folder / CONFIG, dict[str, Any])
    if raw.get("trireme") is not None:
        raise ArtifactError(f"{folder} has no {MANIFEST}", "the conversion did not finish", "run `trireme convert` again")
    config = read_config(folder / CONFIG, raw)
    for rank in range(config.parallel.world):
        if not (folder / rank_file(rank)).exists():
            layout = f"tp={config.parallel.tp} pp={config.parallel.pp}"
            raise ArtifactError(f"{folder / rank_file(rank)} is missing", f"{layout} needs it", "copy it too, or convert the model again")
    # A head that is not stored is the embedding's: old converters left it out. One that is stored is used as it is.
    last = SafetensorsFile(folder / rank_file(config.parallel.world - 1))
    model = msgspec.structs.replace(config.model, tied_embeddings=HEAD not in last.entries)
    facts = describe(model, config.parallel, config.dtype, read_eos(folder))
    return Checkpoint(folder=folder, facts=facts, quant=config.quant, manifest=None, embedding=config.embedding)


def check_size(folder: Path, manifest: Manifest, name: str) -> None:
    """Raises :class:`ArtifactError` when a listed file is missing or has another size."""
    try:
        size = (folder / name).stat().st_size
    except OSError as error:
        raise ArtifactError(f"{folder / name} is missing or unreadable", error.strerror or str(error), CONVERT_AGAIN) from error
    if size != manifest.files[name].bytes:
        raise ArtifactError(
            f"{folder / name} has another size than the manifest", f"expected {manifest.files[name].bytes} bytes, got {size}", CONVERT_AGAIN
        )


def verify(folder: Path, manifest: Manifest, name: str) -> None:
    """Read a whole file and compare its hash with the manifest's. Raises :class:`ArtifactError` with the file and both hashes."""
    check_size(folder, manifest, name)
    expected, got = manifest.files[name], hash_file(folder / name)
    if got != expected:
        raise ArtifactError(f"{folder / name} is damaged", f"expected sha256 {expected.sha256}, got {got.sha256}", CONVERT_AGAIN)


def verify_all(checkpoint: Checkpoint) -> None:
    """:func:`verify` every file of the manifest; without one there is nothing to compare."""
    if checkpoint.manifest is not None:
        for name in checkpoint.manifest.files:
            verify(checkpoint.folder, checkpoint.manifest, name)


def open_rank(checkpoint: Checkpoint, rank: int) -> SafetensorsFile:
    """The file of ``rank``. Raises :class:`ArtifactError` when a tensor in it has another name, shape or format than it should."""
    file = SafetensorsFile(checkpoint.folder / rank_file(rank))
    own = checkpoint.manifest is not None
    wanted = {each.tensor.name: each for each in checkpoint.stored(rank)}
    names = file.entries.keys() if own else {name for name in file.entries if not name.endswith(_NVIDIAS_EXTRAS)}
    if different := sorted(wanted.keys() ^ names):
        what = "lacks" if different[0] in wanted else "holds an unknown tensor"
        raise ArtifactError(f"{file.path} {what} {different[0]}", f"{len(different)} names differ from its layout", CONVERT_AGAIN)
    for name, each in wanted.items():
        entry = file.entries[name]
        formats = (NAMES[each.format],) if own else tuple(NAMES[form] for form in DTYPE_NAMES)
        if entry.shape != each.tensor.shape or entry.dtype not in formats:
            raise ArtifactError(
                f"{file.path}: {name} is {entry.dtype} {list(entry.shape)}",
                f"expected {each.format} {list(each.tensor.shape)}",
                CONVERT_AGAIN,
            )
    return file


class CheckpointSource:
    """Whole tensors, or their parts, joined from the ranks' shards. A file is opened when it is first read."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._files: dict[int, SafetensorsFile] = {}
        #: Whole tensor's name → where its parts lie: (global span, rank, stored name, local start).
        self._parts: dict[str, list[tuple[Span, int, str, int]]] = {}
        for rank in range(checkpoint.facts.parallel.world):
            for each in checkpoint.stored(rank):
                for piece, place in each.tensor.places():
                    self._parts.setdefault(piece.tensor.name, []).append((piece.span, rank, each.tensor.name, place.start))

    def read(self, tensor: ModelTensor, span: Span) -> Block:
        if tensor.name == EMBEDDING and self._checkpoint.embedding == "columns":
            return self._joined_columns(span)
        pieces, at, form = [], span.start, None
        # Copies (key/value heads, tied rows) overlap: in order of their starts, each part adds only what is still missing.
        for part, rank, name, local in sorted(self._parts[tensor.name]):
            if part.start <= at < min(part.stop, span.stop):
                stop = min(part.stop, span.stop)
                begin = local + at - part.start
                values, form = self._file(rank).view(name)
                pieces.append(cut(values, tensor, Span(begin, begin + stop - at)))
                at = stop
        assert form is not None, f"no shard holds {tensor.name}"
        return Block(pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=tensor.axis), form)

    def _joined_columns(self, rows: Span) -> Block:
        """Rows of an embedding of which each rank has some columns."""
        found = [self._file(rank).view(name) for _, rank, name, _ in sorted(self._parts[EMBEDDING])]
        return Block(np.concatenate([values[rows.start : rows.stop] for values, _ in found], axis=1), found[0][1])

    def release(self) -> None:
        for file in self._files.values():
            file.release()

    def _file(self, rank: int) -> SafetensorsFile:
        if rank not in self._files:
            self._files[rank] = open_rank(self._checkpoint, rank)
        return self._files[rank]
