"""Hugging Face folders: ``config.json`` as a ModelSpec, and the weights as a Source.

Owns the meaning of the configs of the supported models, and the list of what is refused. A model that would run wrongly is refused by name;
nothing is guessed. Never executes code from a folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from workers.artifacts.json_file import decode
from workers.artifacts.number_formats import Array
from workers.artifacts.recognition import QUANTIZED_NAMES, what_model_type
from workers.artifacts.safetensors_file import COPY_AGAIN, NAMES, SUPPORTED_MODELS, SafetensorsFile
from workers.artifacts.source import CHUNK, Block, cut
from workers.artifacts.weight_map import WeightMap
from workers.layout.declaration import EMBEDDING, HEAD
from workers.layout.sharding import ModelTensor, Span
from workers.models.registry import FAMILIES, file_places, file_shapes
from workers.protocol.errors import ArtifactError, ConfigError
from workers.protocol.specs import DTYPE_BYTES, DType, ModelSpec, Quant

#: The folder with the chat templates that have names (``tool_use.jinja``).
MORE_TEMPLATES = "additional_chat_templates"
#: The files of a tokenizer, and its folder of templates; other files of a folder are never copied.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)  # fmt: skip
EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")
#: Files in which tools write how they quantized the weights, where ``config.json`` does not say it: (name, tool).
QUANTIZED_BY = (("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ"))
#: What ModelOpt writes, beside ``config.json`` or in it. TensorRT-LLM reads such weights.
MODELOPT, MODELOPT_METHOD = "hf_quant_config.json", "modelopt"
#: Tensors that follow from the config, or that are scales of a quantized KV cache: nobody reads them.
UNREAD_NAMES = ("rotary_emb.inv_freq", ".k_scale", ".v_scale")
_BACKBONE = "model."


class _Stored(msgspec.Struct):
    """What ``config.json`` says of the weights' number format; ``torch_dtype`` in files of transformers 4."""

    dtype: str | None = None
    torch_dtype: str | None = None


class _Eos(msgspec.Struct):
    eos_token_id: int | list[int] | None = None


def read_model(folder: Path) -> ModelSpec:
    """The model that ``config.json`` describes. Raises :class:`ArtifactError`, naming what is not supported."""
    path = folder / "config.json"
    raw = decode(path, dict[str, Any])
    _refuse_kind(path, raw)
    family = FAMILIES[raw["model_type"]]
    try:
        return family.read(decode(path, family.config))
    except ConfigError as error:
        raise ArtifactError(f"{path}: {error.what}", error.why, error.hint or SUPPORTED_MODELS) from error


def _refuse_kind(path: Path, raw: dict[str, Any]) -> None:
    """Refuse by name what is another kind of model, before the keys of a supported one are looked for."""
    if experts := next((key for key in EXPERT_KEYS if raw.get(key)), None):
        raise ArtifactError(f"{path}: mixture of experts is not supported", f"{experts} is {raw[experts]}", SUPPORTED_MODELS)
    if raw.get("model_type") not in FAMILIES:
        raise what_model_type(path, raw, FAMILIES)
    names = raw.get("architectures") or []
    if isinstance(names, list) and names and not any(_generates(str(name)) for name in names):
        why = "it has another head than that of a language model"
        raise ArtifactError(f"{path}: {names[0]} does not generate text", why, "use the causal language model")
    if (method := _quantized_by(path.parent, raw)) not in (None, MODELOPT_METHOD):
        why = "its weights are read as they are"
        raise ArtifactError(f"{path}: weights quantized with {method!r} are not supported", why, "use the unquantized model")


def _quantized_by(folder: Path, raw: dict[str, Any]) -> str | None:
    """The tool or method that quantized the weights, by ``config.json`` or by the file that a tool left beside it."""
    for key in ("quantization_config", "quantization", "compression_config"):
        if raw.get(key):
            # MLX writes ``quantization`` without a method.
            unnamed = "MLX" if key == "quantization" else "unnamed"
            return str(raw[key].get("quant_method", unnamed) if isinstance(raw[key], dict) else raw[key])
    for name, tool in QUANTIZED_BY:
        if (folder / name).is_file():
            return str(decode(folder / name, dict[str, Any]).get("quant_method") or tool)
    return None


def _generates(architecture: str) -> bool:
    """Whether a class of transformers is a causal language model, or the backbone of one."""
    return architecture.endswith(("ForCausalLM", "LMHeadModel")) or (architecture.endswith("Model") and "For" not in architecture)


def read_quant(folder: Path) -> Quant:
    """What ModelOpt says about the weights of a folder. Raises :class:`ArtifactError` for a file that is damaged."""
    keys = decode(folder / "config.json", dict[str, Any])
    if _quantized_by(folder, keys) == MODELOPT_METHOD:
        found = keys.get("quantization_config")
    elif (folder / MODELOPT).is_file():
        found = decode(folder / MODELOPT, dict[str, Any]).get("quantization")
    else:
        found = None
    algo = found.get("quant_algo") if isinstance(found, dict) else None
    return Quant(quant_algo=algo) if isinstance(algo, str) and algo != "NO_QUANT" else Quant()


def tokenizer_paths(folder: Path) -> dict[str, Path]:
    """The files of a folder's tokenizer, by their name in it (``additional_chat_templates/rag.jinja``)."""
    paths = [*(folder / name for name in _TOKENIZER_FILES), *sorted((folder / MORE_TEMPLATES).glob("*.jinja"))]
    return {str(path.relative_to(folder)): path for path in paths if path.is_file()}


def declared_dtype(folder: Path) -> str:
    """The number format (``bfloat16``) that ``config.json`` names; empty where it names none."""
    stored = decode(folder / "config.json", _Stored)
    return stored.dtype or stored.torch_dtype or ""


def read_eos(folder: Path) -> tuple[int, ...]:
    """End-of-sequence ids: those of ``generation_config.json`` first, then those of ``config.json``."""
    found: dict[int, None] = {}
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            ids = decode(folder / name, _Eos).eos_token_id
            found |= dict.fromkeys([ids] if isinstance(ids, int) else ids or [])
    return tuple(found)


def tied(weights: WeightMap, model: ModelSpec) -> ModelSpec:
    """``model`` with its head tied to the embedding, or not, as the weights are.

    ``config.json`` may say that they are tied while a head of other values is stored: then that head is the right one, as for
    transformers. Reads both whole where both are stored.
    """
    names = _stored_names(weights, [EMBEDDING, HEAD])
    if not model.tied_embeddings or not {names[EMBEDDING], names[HEAD]} <= weights.names:
        return model
    embedding, head = (weights.file_of(names[name]).view(names[name]) for name in (EMBEDDING, HEAD))
    if embedding[0].shape == head[0].shape and embedding[1] == head[1] and _equal(embedding[0], head[0]):
        weights.release()
        return model
    return msgspec.structs.replace(model, tied_embeddings=False)


def _equal(left: Array, right: Array) -> bool:
    rows = max(1, CHUNK // left.shape[-1])
    return all(np.array_equal(left[at : at + rows], right[at : at + rows]) for at in range(0, len(left), rows))


def _stored_names(weights: WeightMap, wanted: Iterable[str]) -> dict[str, str]:
    """The names under which a folder holds the tensors ``wanted``: the backbone's tensors may stand there without their ``model.``, as
    the backbone alone is saved."""
    bare = EMBEDDING not in weights.names and EMBEDDING.removeprefix(_BACKBONE) in weights.names
    names = {name: name.removeprefix(_BACKBONE) if bare else name for name in wanted}
    if names.get(EMBEDDING) not in weights.names and HEAD in weights.names and HEAD not in names:
        names[EMBEDDING] = HEAD  # a tied model of which the head was saved, and not the embedding
    return names


class HuggingFaceSource:
    """The safetensors files of a folder, each mapped, and checked against the model before the first read."""

    def __init__(self, folder: Path, model: ModelSpec) -> None:
        """Raises :class:`ArtifactError` naming the first tensor that is missing, misshapen or unknown."""
        self._weights = WeightMap(folder)
        self._places = file_places(model)
        wanted = file_shapes(model)
        self._names = _stored_names(self._weights, wanted)
        # Many folders store a tied head a second time.
        known = {*self._names.values(), HEAD}
        extra = sorted(name for name in self._weights.names - known if not name.endswith(UNREAD_NAMES))
        self._refuse_other_weights(folder, extra)
        for name, expected in wanted.items():
            file = self._file(folder, name)
            shape = file.entries[self._names[name]].shape
            if shape != expected:
                raise ArtifactError(f"{folder}: {name} has shape {list(shape)}", f"config.json means {list(expected)}", COPY_AGAIN)
            _plain(file, self._names[name])
        if extra:
            raise ArtifactError(
                f"{folder} holds a tensor that the model does not have: {extra[0]}", f"{len(extra)} such tensors", SUPPORTED_MODELS
            )

    def read(self, tensor: ModelTensor, span: Span) -> Block:
        held, first = self._places[tensor.name]
        values, form = self._weights.file_of(self._names[held]).view(self._names[held])
        return Block(cut(values[first : first + tensor.shape[0]], tensor, span), form)

    def release(self) -> None:
        self._weights.release()

    @staticmethod
    def _refuse_other_weights(folder: Path, extra: list[str]) -> None:
        """Name the weights whose names say what was done to them."""
        if part := next((name for name in extra if name.endswith(QUANTIZED_NAMES)), None):
            raise ArtifactError(f"{folder}: its weights are quantized", f"it holds {part}", "use the unquantized model")
        if part := next((name for name in extra if ".lora_" in name or ".base_layer." in name), None):
            raise ArtifactError(
                f"{folder} holds a LoRA adapter that is not merged", f"it holds {part}", "merge it (peft: merge_and_unload)"
            )
        if part := next((name for name in extra if name.startswith(("vision", "visual", "model.vision", "multi_modal", "audio"))), None):
            raise ArtifactError(f"{folder} is a multimodal model, not supported", f"it holds {part}", SUPPORTED_MODELS)

    def _file(self, folder: Path, name: str) -> SafetensorsFile:
        try:
            return self._weights.file_of(self._names[name])
        except KeyError:
            pass
        if name == HEAD:
            backbone = self._names[EMBEDDING] != EMBEDDING
            what = "is a model without a head, as embedding models are" if backbone else "lacks the model's head"
            why = f"it has no {HEAD}, and config.json does not tie it to the embedding (tie_word_embeddings)"
            raise ArtifactError(f"{folder} {what}", why, "use the causal language model: this one cannot generate text")
        named = f"its tensors are named like {min(self._weights.names)}" if self._weights.names else "it holds no tensor at all"
        raise ArtifactError(f"{folder} lacks the tensor {name}", f"config.json means a model that has it; {named}", COPY_AGAIN)


def stored_dtype(weights: WeightMap, quant: Quant) -> DType:
    """Number format of most weights; of the embedding where ``quant`` quantizes the others. Raises :class:`ArtifactError` for quantized
    ones."""
    if quant.quant_algo is not None and EMBEDDING in weights.names:
        return _plain(weights.file_of(EMBEDDING), EMBEDDING)
    return _plain(*weights.largest())


def _plain(file: SafetensorsFile, name: str) -> DType:
    """Format of a tensor that is not quantized. Raises :class:`ArtifactError` for one that is."""
    entry, plain = file.entries[name], {NAMES[dtype]: dtype for dtype in DTYPE_BYTES}
    if entry.dtype not in plain:
        raise ArtifactError(f"{file.path}: {name} is {entry.dtype}", f"weights can be read as {', '.join(plain)}", SUPPORTED_MODELS)
    return plain[entry.dtype]
