"""Hugging Face folders: ``config.json`` as a ModelSpec, and the weights as a Source.

Owns the meaning of the configs of the supported models, and the list of what is refused. A model that would run wrongly is refused by name;
nothing is guessed. Never executes code from a folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import msgspec

from workers.artifacts.safetensors_file import COPY_AGAIN, NAMES, SUPPORTED_MODELS, SafetensorsFile, regular
from workers.artifacts.source import Block, cut
from workers.layout.sharding import HEAD, ModelTensor, Span, whole_tensors
from workers.protocol.errors import ArtifactError, ConfigError
from workers.protocol.specs import ARCHITECTURES, DTYPE_BYTES, DType, ModelSpec, RopeScaling

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
#: The folder with the chat templates that have names (``tool_use.jinja``).
MORE_TEMPLATES = "additional_chat_templates"
#: The files of a tokenizer, and its folder of templates; other files of a folder are never copied.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)  # fmt: skip
#: (key in ``config.json``, field of RopeScaling).
ROPE_FIELDS = (
    ("factor", "factor"),
    ("low_freq_factor", "low_freq_factor"),
    ("high_freq_factor", "high_freq_factor"),
    ("original_max_position_embeddings", "original_max_position"),
)
EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")

T = TypeVar("T")


class _Config(msgspec.Struct, kw_only=True):
    """The keys of ``config.json`` that matter here; defaults are those of transformers' own classes."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: float = 1.0
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    use_sliding_window: bool = False
    layer_types: list[str] | None = None
    quantization_config: dict[str, Any] | None = None


class _Eos(msgspec.Struct):
    eos_token_id: int | list[int] | None = None


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def decode(path: Path, kind: type[T]) -> T:
    """A JSON file as ``kind``. Raises :class:`ArtifactError` naming the file."""
    try:
        return msgspec.json.decode(regular(path).read_bytes(), type=kind)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read", error.strerror or str(error), COPY_AGAIN) from error
    except msgspec.MsgspecError as error:
        raise ArtifactError(f"{path} does not make sense", str(error), COPY_AGAIN) from error
    except ConfigError as error:
        raise ArtifactError(f"{path}: {error.what}", error.why, error.hint or COPY_AGAIN) from error


def read_model(folder: Path) -> ModelSpec:
    """The model that ``config.json`` describes. Raises :class:`ArtifactError`, naming what is not supported."""
    path = folder / "config.json"
    config = decode(path, _Config)
    _refuse(path, config, decode(path, dict[str, Any]))
    theta, scaling = _rope(path, config)
    position = config.max_position_embeddings
    if config.sliding_window and (config.model_type == "mistral" or config.use_sliding_window):
        # Up to the length of its window a sliding-window model is exactly a full-attention model: serve it that far.
        position = min(position, config.sliding_window)
    try:
        return ModelSpec(
            architecture=config.model_type,  # type: ignore[arg-type]  # checked by _refuse
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=config.head_dim or config.hidden_size // max(1, config.num_attention_heads),
            vocab_size=config.vocab_size,
            max_position=position,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=theta,
            rope_scaling=scaling,
            tied_embeddings=config.tie_word_embeddings,
            qkv_bias=config.model_type == "qwen2",
            qk_norm=config.model_type == "qwen3",
        )
    except ConfigError as error:
        raise ArtifactError(f"{path}: {error.what}", error.why, error.hint) from error


def _refuse(path: Path, config: _Config, raw: dict[str, Any]) -> None:
    known = ", ".join(ARCHITECTURES)
    if experts := next((key for key in EXPERT_KEYS if raw.get(key)), None):
        raise ArtifactError(f"{path}: mixture of experts is not supported", f"{experts} is {raw[experts]}", SUPPORTED_MODELS)
    if config.model_type not in ARCHITECTURES:
        raise ArtifactError(f"{path}: model_type {config.model_type!r} is not supported", f"known: {known}", SUPPORTED_MODELS)
    if config.hidden_act != "silu":
        raise ArtifactError(f"{path}: activation {config.hidden_act!r} is not supported", "known: silu", SUPPORTED_MODELS)
    if config.quantization_config is not None:
        method = config.quantization_config.get("quant_method", "unnamed")
        raise ArtifactError(
            f"{path}: weights quantized with {method!r} are not supported", "its shards are read as they are", "use the unquantized model"
        )
    for key, value, want in (
        ("attention_bias", config.attention_bias and config.model_type != "qwen2", False),
        ("mlp_bias", config.mlp_bias, False),
        ("partial_rotary_factor", config.partial_rotary_factor, 1.0),
    ):
        if value != want:
            raise ArtifactError(f"{path}: {key}={value} is not supported", f"known: {want}", SUPPORTED_MODELS)
    if other := set(config.layer_types or ()) - {"full_attention", "sliding_attention"}:
        raise ArtifactError(
            f"{path}: layer type {min(other)!r} is not supported", "known: full_attention, sliding_attention", SUPPORTED_MODELS
        )


def _rope(path: Path, config: _Config) -> tuple[float, RopeScaling | None]:
    """(theta, scaling). transformers 5 writes both into ``rope_parameters``, older releases write theta beside ``rope_scaling``."""
    rope = {**(config.rope_scaling or {}), **(config.rope_parameters or {})}
    theta = rope.get("rope_theta", config.rope_theta or 10000.0)
    if not isinstance(theta, int | float) or theta <= 0:
        raise ArtifactError(f"{path}: rope_theta {theta!r} does not make sense", "it is a positive number", COPY_AGAIN)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default" and any(isinstance(value, dict) for value in rope.values()):
        raise ArtifactError(f"{path}: rotary parameters per layer type are not supported", "all layers share one table", SUPPORTED_MODELS)
    if kind == "default":
        return float(theta), None
    if kind not in ("linear", "llama3"):
        raise ArtifactError(f"{path}: rope scaling {kind!r} is not supported", "known: default, linear, llama3", SUPPORTED_MODELS)
    wanted = ROPE_FIELDS if kind == "llama3" else ROPE_FIELDS[:1]
    if missing := [key for key, _ in wanted if key not in rope]:
        raise ArtifactError(f"{path}: rope scaling {kind!r} lacks {missing[0]}", "the scaling cannot be computed without it", COPY_AGAIN)
    try:
        return float(theta), msgspec.convert({"kind": kind} | {field: rope[key] for key, field in wanted}, RopeScaling)
    except (msgspec.ValidationError, ConfigError) as error:
        raise ArtifactError(f"{path}: rope scaling does not make sense", str(error), COPY_AGAIN) from error


def tokenizer_paths(folder: Path) -> dict[str, Path]:
    """The files of a folder's tokenizer, by their name in it (``additional_chat_templates/rag.jinja``)."""
    paths = [*(folder / name for name in _TOKENIZER_FILES), *sorted((folder / MORE_TEMPLATES).glob("*.jinja"))]
    return {str(path.relative_to(folder)): path for path in paths if path.is_file()}


def read_eos(folder: Path) -> tuple[int, ...]:
    """End-of-sequence ids: those of ``generation_config.json`` first, then those of ``config.json``."""
    found: dict[int, None] = {}
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            ids = decode(folder / name, _Eos).eos_token_id
            found |= dict.fromkeys([ids] if isinstance(ids, int) else ids or [])
    return tuple(found)


class HuggingFaceSource:
    """The safetensors files of a folder, each mapped, and checked against the model before the first read."""

    def __init__(self, folder: Path, model: ModelSpec) -> None:
        """Raises :class:`ArtifactError` naming the first tensor that is missing, misshapen or unknown."""
        self._files = [SafetensorsFile(path) for path in weight_files(folder)]
        self._file_of = {name: file for file in self._files for name in file.entries}
        wanted = whole_tensors(model)
        for name, tensor in wanted.items():
            if name not in self._file_of:
                raise ArtifactError(f"{folder} lacks the tensor {name}", "config.json means a model that has it", COPY_AGAIN)
            shape = self._file_of[name].entries[name].shape
            if shape != tensor.shape:
                raise ArtifactError(f"{folder}: {name} has shape {list(shape)}", f"config.json means {list(tensor.shape)}", COPY_AGAIN)
            _plain(self._file_of[name], name)
        # Many folders store a tied head a second time; rotary frequencies follow from the config.
        extra = [name for name in self._file_of if name not in wanted and name != HEAD and not name.endswith("rotary_emb.inv_freq")]
        if extra:
            raise ArtifactError(
                f"{folder} holds a tensor that the model does not have: {extra[0]}", f"{len(extra)} such tensors", SUPPORTED_MODELS
            )

    def read(self, tensor: ModelTensor, span: Span) -> Block:
        values, form = self._file_of[tensor.name].view(tensor.name)
        return Block(cut(values, tensor, span), form)

    def release(self) -> None:
        for file in self._files:
            file.release()


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files, existing or not. Raises :class:`ArtifactError` for pickled weights and for none at all."""
    if (folder / INDEX).is_file():
        names = sorted(set(decode(folder / INDEX, _Index).weight_map.values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise ArtifactError(f"{folder / INDEX} points outside the folder", outside[0], COPY_AGAIN)
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickled = next((path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(folder.glob(pattern))), None)
    if pickled is not None:
        raise ArtifactError(f"{folder} holds pickled weights ({pickled})", "a pickle can run code", "save the model as safetensors")
    raise ArtifactError(f"{folder} holds no weights", f"neither {SINGLE} nor {INDEX} is there", COPY_AGAIN)


def stored_dtype(folder: Path) -> DType:
    """Number format of most weights. Raises :class:`ArtifactError` for quantized ones."""
    file = SafetensorsFile(weight_files(folder)[0])
    name, _ = max(file.entries.items(), key=lambda item: item[1].data_offsets[1] - item[1].data_offsets[0])
    return _plain(file, name)


def _plain(file: SafetensorsFile, name: str) -> DType:
    """Format of a tensor that is not quantized. Raises :class:`ArtifactError` for one that is."""
    entry, plain = file.entries[name], {NAMES[dtype]: dtype for dtype in DTYPE_BYTES}
    if entry.dtype not in plain:
        raise ArtifactError(f"{file.path}: {name} is {entry.dtype}", f"weights can be read as {', '.join(plain)}", SUPPORTED_MODELS)
    return plain[entry.dtype]
