"""Opens every kind of model file: it determines what a path holds, and how its weights are read.

Owns the distinction between checkpoints, Hugging Face folders and GGUF files. Reads no weights itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from workers.artifacts import gguf, hf
from workers.artifacts.checkpoint import CONFIG, DTYPE_NAMES, CheckpointSource, read_checkpoint
from workers.artifacts.gguf_tokenizer import end_ids, read_vocabulary
from workers.artifacts.hf_quantization import Scheme
from workers.artifacts.json_file import decode
from workers.artifacts.quantize import QuantizedSource
from workers.artifacts.recognition import what_config, what_folder
from workers.artifacts.safetensors_file import COPY_AGAIN
from workers.artifacts.source import Source
from workers.artifacts.weight_map import WeightMap
from workers.protocol.errors import ArtifactError
from workers.protocol.specs import PLAIN, DType, ModelSpec, Parallel, Quant, QuantName, quant_of

Kind = Literal["checkpoint", "huggingface", "gguf"]
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Artifact(msgspec.Struct, frozen=True, kw_only=True):
    """What a model path holds. ``dtype``: format of the stored weights that are not quantized (fp32 for a GGUF file, whose weights are
    dequantized).

    ``parallel``: layout of a checkpoint; None for whole models. ``tokenizer_dir``: folder with ``tokenizer.json``; None where there is none
    (a GGUF's tokenizer becomes files when it is converted). ``own``: a checkpoint of `trireme convert`, which has hashes, and of which
    each rank's file is what the rank loads. ``scheme``: how another tool quantized the weights; ``quant`` is then the format in which they
    are read. ``dequantized``: the form of which plain weights are made while loading, in words; empty where none are. ``stored_bytes``:
    bytes of the tensors in a GGUF or a Hugging Face folder.
    """

    path: Path
    kind: Kind
    model: ModelSpec
    dtype: DType
    parallel: Parallel | None
    tokenizer_dir: Path | None
    eos_ids: tuple[int, ...]
    quant: Quant = Quant()
    own: bool = False
    scheme: Scheme | None = None
    dequantized: str = ""
    stored_bytes: int = 0

    @property
    def foreign(self) -> bool:
        """Whether the weights are in a format that only TensorRT-LLM reads."""
        own = self.own or self.scheme is not None
        return self.quant.quant_algo is not None and (self.quant.weights is None or not own)

    def runs_on(self, parallel: Parallel) -> bool:
        """Whether ranks of the layout ``parallel`` can load the artifact directly: it has that layout, or whole weights that each rank
        slices."""
        return self.parallel is None or self.parallel in (parallel, Parallel())


def open_artifact(path: str | Path, *, weights_optional: bool = False) -> Artifact:
    """Find out what ``path`` holds, without reading weights. ``weights_optional``: a Hugging Face folder need not have any; its dtype is
    then the one that its ``config.json`` names, else fp32.

    Raises :class:`ArtifactError` naming the file at fault.
    """
    path = Path(path)
    if not path.exists():
        raise ArtifactError(f"there is no model at {path}", "no such file or folder", "give a folder, a GGUF file or a model's name")
    if path.is_file():
        return _open_gguf(path)
    if not (path / CONFIG).is_file():
        raise what_folder(path)
    keys = decode(path / CONFIG, dict[str, Any])
    if "pretrained_config" in keys:
        raise ArtifactError(f"{path} holds a TensorRT-LLM engine, not weights", "only the trtllm engine runs it", "use `--engine trtllm`")
    if "architecture" in keys and "architectures" not in keys:
        return _open_checkpoint(path)
    if "model_type" in keys:
        return _open_huggingface(path, weights_optional)
    raise what_config(path / CONFIG, keys)


def quant_for(artifact: Artifact, name: QuantName | None) -> Quant:
    """The formats of the artifact's weights in a replica with the setting ``name``; None = as they are stored."""
    if name is None or name == artifact.quant.weights:
        return artifact.quant
    return msgspec.structs.replace(quant_of(name), kv_cache_quant_algo=artifact.quant.kv_cache_quant_algo)


def open_source(artifact: Artifact, quant: Quant | None = None) -> Source:
    """The artifact's weights. With ``quant`` they read as if they were stored in that format: they are quantized while they are read.

    Raises:
        ArtifactError: tensors are missing, misshapen or unknown, or the weights are quantized otherwise already.
        ConfigError: the model's shapes do not fit the groups.
    """
    source = _open_stored(artifact)
    if quant is None or quant.same_weights(artifact.quant):
        return source
    if artifact.quant.quant_algo is not None:
        raise ArtifactError(
            f"{artifact.path} is quantized with {artifact.quant.quant_algo} already",
            f"its weights cannot become {quant.quant_algo}",
            "convert the unquantized model",
        )
    return QuantizedSource(source, artifact.model, quant)


def refuse_foreign(artifact: Artifact) -> None:
    """Raises :class:`ArtifactError` for weights in a format that only TensorRT-LLM reads."""
    if artifact.foreign:
        raise ArtifactError(
            f"{artifact.path} is quantized with {artifact.quant.quant_algo}",
            "only TensorRT-LLM reads these weights",
            "use the unquantized model",
        )


def _open_stored(artifact: Artifact) -> Source:
    if artifact.kind == "gguf":
        return gguf.GgufSource(gguf.GgufFile(artifact.path), artifact.model)
    refuse_foreign(artifact)
    if artifact.kind == "huggingface":
        return hf.HuggingFaceSource(artifact.path, artifact.model, artifact.scheme, artifact.quant)
    return CheckpointSource(read_checkpoint(artifact.path))


def _open_gguf(path: Path) -> Artifact:
    file = gguf.GgufFile(path)
    model, vocabulary = gguf.read_model(file), read_vocabulary(path, file.metadata)
    if len(vocabulary.tokens) > model.vocab_size:
        why = f"the tokenizer has {len(vocabulary.tokens)} tokens, the embedding {model.vocab_size} rows"
        raise ArtifactError(f"{path} does not make sense", why, COPY_AGAIN)
    return Artifact(
        path=path,
        kind="gguf",
        model=model,
        dtype="fp32",
        parallel=None,
        tokenizer_dir=None,
        eos_ids=end_ids(vocabulary),
        dequantized=f"GGUF ({', '.join(file.quantized_types)})" if file.quantized_types else "",
        stored_bytes=sum(info.size for info in file.tensors.values()),
    )


def _open_huggingface(path: Path, weights_optional: bool) -> Artifact:
    model, (scheme, named) = hf.read_model(path), hf.read_quantization(path)
    weights = None if weights_optional else WeightMap(path)
    if weights is not None:
        model = hf.tied(weights, model)
    quant = named if scheme is None else hf.computed_quant(weights, scheme, model)
    dtype = (
        _DTYPES.get(hf.declared_dtype(path), "fp32")
        if weights is None
        else hf.stored_dtype(weights, is_quantized=scheme is not None or named.quant_algo is not None)
    )
    return Artifact(
        path=path,
        kind="huggingface",
        model=model,
        dtype=dtype,
        parallel=None,
        tokenizer_dir=_tokenizer_dir(path),
        eos_ids=hf.read_eos(path),
        quant=quant,
        scheme=scheme,
        dequantized=scheme.words if scheme is not None and quant == PLAIN else "",
        stored_bytes=0 if weights is None else weights.nbytes,
    )


def _open_checkpoint(path: Path) -> Artifact:
    checkpoint = read_checkpoint(path)
    return Artifact(
        path=path,
        kind="checkpoint",
        model=checkpoint.facts.model,
        dtype=checkpoint.facts.dtype,
        parallel=checkpoint.facts.parallel,
        tokenizer_dir=_tokenizer_dir(path),
        eos_ids=checkpoint.facts.eos_ids,
        quant=checkpoint.quant,
        own=checkpoint.manifest is not None,
    )


def _tokenizer_dir(path: Path) -> Path | None:
    return path if (path / "tokenizer.json").is_file() else None
