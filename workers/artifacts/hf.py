"""Hugging Face folders: ``config.json`` as a ModelSpec, and the weights as a Source.

Owns the meaning of the configs of the supported models, and the list of what is refused. A model that would give wrong results is refused
by name; nothing is guessed. Never executes code from a folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from workers.artifacts.hf_quantization import Scheme, modelopt_algorithm, read_scheme
from workers.artifacts.json_file import decode
from workers.artifacts.number_formats import Array
from workers.artifacts.recognition import QUANTIZED_NAMES, what_model_type
from workers.artifacts.safetensors_file import COPY_AGAIN, NAMES, SUPPORTED_MODELS, SafetensorsFile
from workers.artifacts.source import CHUNK, Block, cut, rotary_halves
from workers.artifacts.stored_forms import Parts, Scaled, StoredForm, Transposed
from workers.artifacts.weight_map import WeightMap
from workers.layout.declaration import EMBEDDING, HEAD
from workers.layout.quant_parts import Part, quantized, whole_parts
from workers.layout.sharding import ModelTensor, Span, whole_tensors
from workers.models.registry import FAMILIES, file_places, is_packed, rotated_rows
from workers.protocol.errors import ArtifactError, ConfigError
from workers.protocol.specs import DTYPE_BYTES, PLAIN, DType, ModelSpec, Quant, quant_of

#: The folder with the chat templates that have names (``tool_use.jinja``).
MORE_TEMPLATES = "additional_chat_templates"
#: The files of a tokenizer, and its folder of templates; other files of a folder are never copied.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)  # fmt: skip
EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")
#: Tensors that follow from the config, or that are scales of a quantized KV cache or of inputs, which engines make themselves.
UNREAD_NAMES = ("rotary_emb.inv_freq", ".k_scale", ".v_scale", ".input_scale", ".weight_shape")
_BACKBONE = "model."
#: Multimodal models whose text model is served alone.
WRAPPERS = ("gemma3", "llava", "mistral3")
#: What stands before a backbone's names in a folder, and before the head's: as a causal language model is saved, its backbone alone, and
#: the text model of a multimodal one by releases of transformers before 5 and since.
_NAMED = ((_BACKBONE, ""), ("", ""), ("language_model.model.", "language_model."), ("model.language_model.", ""))
#: What such a folder holds beside its text model.
_OTHER_MODALITIES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
#: A file's names of the unquantized number formats.
_PLAIN_NAMES: dict[str, DType] = {NAMES[dtype]: dtype for dtype in DTYPE_BYTES}


class _Stored(msgspec.Struct):
    """What ``config.json`` says of the weights' number format; ``torch_dtype`` in files of transformers 4."""

    dtype: str | None = None
    torch_dtype: str | None = None


class _Eos(msgspec.Struct):
    eos_token_id: int | list[int] | None = None


def read_model(folder: Path) -> ModelSpec:
    """The model that ``config.json`` describes. Raises :class:`ArtifactError`, naming what is not supported."""
    path = folder / "config.json"
    raw = _text_keys(decode(path, dict[str, Any]))
    _refuse_kind(path, raw)
    family = FAMILIES[raw["model_type"]]
    try:
        return family.read(msgspec.convert(raw, family.config))
    except ConfigError as error:
        raise ArtifactError(f"{path}: {error.what}", error.why, error.hint or SUPPORTED_MODELS) from error
    except msgspec.ValidationError as error:
        raise ArtifactError(f"{path} does not make sense", str(error), COPY_AGAIN) from error


def _text_keys(raw: dict[str, Any]) -> dict[str, Any]:
    """The keys of the text model: those of ``config.json``, or in a multimodal model those of its ``text_config``."""
    text = raw.get("text_config")
    if raw.get("model_type") not in WRAPPERS or not isinstance(text, dict) or text.get("model_type") not in FAMILIES:
        return raw
    # Either place may say that the head is the embedding; a head of other values, if there is one, is used all the same.
    said = [keys["tie_word_embeddings"] for keys in (raw, text) if "tie_word_embeddings" in keys]
    return text | {"tie_word_embeddings": any(said)} if said else text


def _refuse_kind(path: Path, raw: dict[str, Any]) -> None:
    """Refuse another kind of model by name, before the keys of a supported one are read."""
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise what_model_type(path, raw, FAMILIES)
    known = FAMILIES[kind].config.__struct_fields__
    if experts := next((key for key in EXPERT_KEYS if raw.get(key) and not set(EXPERT_KEYS) & set(known)), None):
        what = f"{path}: model_type {kind!r} has no experts"
        raise ArtifactError(what, f"{experts} is {raw[experts]}", SUPPORTED_MODELS)
    names = raw.get("architectures") or []
    if isinstance(names, list) and names and not any(_generates(str(name)) for name in names):
        why = "it has another head than that of a language model"
        raise ArtifactError(f"{path}: {names[0]} does not generate text", why, "use the causal language model")


def _generates(architecture: str) -> bool:
    """Whether a class of transformers is a causal language model, or the backbone of one."""
    return architecture.endswith(("ForCausalLM", "LMHeadModel")) or (architecture.endswith("Model") and "For" not in architecture)


def read_quantization(folder: Path) -> tuple[Scheme | None, Quant]:
    """(how a tool quantized the weights, the formats that ModelOpt names for TensorRT-LLM). Raises :class:`ArtifactError` for a form that
    is not read, and for a file that is damaged."""
    keys = decode(folder / "config.json", dict[str, Any])
    return read_scheme(folder, keys), Quant(quant_algo=modelopt_algorithm(folder, keys))


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
    """The names under which a folder holds the tensors ``wanted``."""
    first = EMBEDDING.removeprefix(_BACKBONE)
    backbone, head = next((each for each in _NAMED if each[0] + first in weights.names), _NAMED[0])
    names = {name: backbone + name.removeprefix(_BACKBONE) if name.startswith(_BACKBONE) else head + name for name in wanted}
    if names.get(EMBEDDING) not in weights.names and HEAD in weights.names and HEAD not in names:
        names[EMBEDDING] = HEAD  # a tied model of which the head was saved, and not the embedding
    return names


def stored_form(weights: WeightMap, scheme: Scheme | None, name: str) -> StoredForm | None:
    """The form in which a tool stored the tensor that a plain folder calls ``name`` (``<layer>.weight``); None: it is plain. The files
    decide: a quantized tensor has other parts than a weight, or a weight that is no plain number."""
    layer = name.removesuffix(".weight")
    form = scheme.form_of(layer) if scheme is not None and layer != name else None
    if form is None or any(f"{layer}.{suffix}" in weights.names for suffix in form.suffixes if suffix != "weight"):
        return form
    packed = name in weights.names and weights.file_of(name).entries[name].dtype not in _PLAIN_NAMES
    return form if packed else None


def computed_quant(weights: WeightMap | None, scheme: Scheme, model: ModelSpec) -> Quant:
    """The format in which engines compute with the linear layers that a tool stored by ``scheme``: the stored one where each layer's
    values are the same in it, else plain. ``weights`` None: they are not there, and all layers count as quantized."""
    whole = whole_tensors(model)
    stored = {name: place.name for name, place in file_places(model).items() if quantized(name, whole[name].shape)}
    names = stored if weights is None else _stored_names(weights, [*stored.values(), EMBEDDING])
    forms = {
        scheme.form_of(place.removesuffix(".weight")) if weights is None else stored_form(weights, scheme, names[place])
        for place in set(stored.values())
    }
    native = {None if form is None else form.native for form in forms}
    name = native.pop() if len(native) == 1 else None
    return PLAIN if name is None else quant_of(name)


class HuggingFaceSource:
    """The safetensors files of a folder, each mapped, and checked against the model before the first read."""

    def __init__(self, folder: Path, model: ModelSpec, scheme: Scheme | None = None, quant: Quant = PLAIN) -> None:
        """``scheme``: how a tool quantized the weights; ``quant``: how they read, as :func:`computed_quant` says. Raises
        :class:`ArtifactError` naming the first tensor that is missing, misshapen or unknown."""
        self._folder, self._weights = folder, WeightMap(folder)
        self._places, self._head_dim = file_places(model, packed=is_packed(model, self._weights.names)), model.head_dim
        self._interleaved = rotated_rows(model) if FAMILIES[model.architecture].interleaved else {}
        self._parts = whole_parts(model, quant, "fp32")
        wanted = {place.name: place.shape for place in self._places.values()}
        self._names = _stored_names(self._weights, wanted)
        forms = {name: stored_form(self._weights, scheme, stored) for name, stored in self._names.items()}
        self._forms = {name: form for name, form in forms.items() if form is not None}
        # Many folders also store a tied head.
        known = {*self._names.values(), *_stored_names(self._weights, [HEAD]).values()}
        for name, form in self._forms.items():
            known |= {f"{self._layer(name)}.{suffix}" for suffix in (*form.suffixes, "g_idx")}
        ignored = _OTHER_MODALITIES if "language_model." in self._names[EMBEDDING] else ()
        extra = sorted(name for name in self._weights.names - known if not name.endswith(UNREAD_NAMES) and not name.startswith(ignored))
        self._refuse_other_weights(folder, extra)
        for name, expected in wanted.items():
            if name in self._forms:
                self._check_form(name, *expected)
                continue
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
        if tensor.name in self._parts:
            whole, part = self._parts[tensor.name]
            return self._in_halves(whole.name, self._read_part(whole, part, span))
        held, first, _ = self._places[tensor.name]
        rows, columns = _area(tensor, span, first)
        if form := self._forms.get(held):
            return self._in_halves(tensor.name, Block(form.values(self._stored_parts(held), rows, columns), "fp32"))
        values, form_name = self._weights.file_of(self._names[held]).view(self._names[held])
        return self._in_halves(tensor.name, Block(cut(_rows(values)[first : first + tensor.shape[0]], tensor, span), form_name))

    def _in_halves(self, name: str, block: Block) -> Block:
        """``block`` of the whole tensor ``name``, heads in the order that the model computes with."""
        rotated = self._interleaved.get(name)
        return Block(rotary_halves(block.values, self._head_dim, rotated), block.format) if rotated else block

    def _read_part(self, whole: ModelTensor, part: Part, span: Span) -> Block:
        """``span`` of a part of the quantized tensor ``whole``, which is stored in the very format of the part."""
        held, first, _ = self._places[whole.name]
        form = self._forms[held]
        assert isinstance(form, Scaled)
        parts = self._stored_parts(held)
        if part.suffix == "weight":
            values, stored = parts("weight")
            return Block(cut(values[first : first + whole.shape[0]], whole, span), stored)
        return Block(form.row_scales(parts, Span(first + span.start, first + span.stop)), part.format)

    def _stored_parts(self, held: str) -> Parts:
        layer = self._layer(held)
        return lambda suffix: self._weights.file_of(f"{layer}.{suffix}").view(f"{layer}.{suffix}")

    def _layer(self, name: str) -> str:
        return self._names[name].removesuffix(".weight")

    def _check_form(self, name: str, out: int, inputs: int) -> None:
        """Raises :class:`ArtifactError` for a part of a quantized tensor that is missing or misshapen."""
        form, layer = self._forms[name], self._layer(name)
        try:
            shapes = form.shapes(out, inputs)
        except ValueError as error:
            why = f"{layer} has {out} outputs and {inputs} inputs: {error}"
            raise ArtifactError(f"{self._folder}: {layer} does not fit its form ({form.words})", why, COPY_AGAIN) from error
        for suffix, expected in shapes.items():
            part = f"{layer}.{suffix}"
            try:
                entry = self._weights.file_of(part).entries[part]
            except KeyError:
                raise ArtifactError(f"{self._folder} lacks the tensor {part}", f"the form is {form.words}", COPY_AGAIN) from None
            if entry.shape not in expected:
                wanted = " or ".join(str(list(shape)) for shape in expected)
                raise ArtifactError(f"{self._folder}: {part} has shape {list(entry.shape)}", f"the form means {wanted}", COPY_AGAIN)
            if entry.dtype not in (kinds := form.kinds(suffix)):
                raise ArtifactError(f"{self._folder}: {part} is {entry.dtype}", f"the form means {' or '.join(kinds)}", COPY_AGAIN)
        if isinstance(form, Transposed) and f"{layer}.g_idx" in self._weights.names:
            groups, _ = self._stored_parts(name)("g_idx")
            if not np.array_equal(groups, np.arange(inputs) // (form.group or inputs)):
                why = "its groups are scattered over the inputs, so that ranks cannot share them"
                raise ArtifactError(f"{self._folder}: GPTQ weights with desc_act are not supported", why, "use the unquantized model")

    def release(self) -> None:
        self._weights.release()

    @staticmethod
    def _refuse_other_weights(folder: Path, extra: list[str]) -> None:
        """Refuse weights whose names show that they were changed, and say how."""
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


def _rows(values: Array) -> Array:
    """View of a stored tensor whose last axis are inputs, with all others as rows."""
    return values if values.ndim < 3 else values.reshape(-1, values.shape[-1])


def _area(tensor: ModelTensor, span: Span, first: int) -> tuple[Span, Span]:
    """(rows, columns) of ``span`` of ``tensor``, whose rows begin at ``first`` in what the file holds."""
    rows = span if tensor.axis == 0 else Span(0, tensor.shape[0])
    columns = span if tensor.axis == 1 else Span(0, tensor.shape[-1])
    return Span(first + rows.start, first + rows.stop), columns


def stored_dtype(weights: WeightMap, *, is_quantized: bool) -> DType:
    """Number format of most weights; of the embedding where others are quantized. Raises :class:`ArtifactError` for quantized ones."""
    name = _stored_names(weights, [EMBEDDING])[EMBEDDING]
    if is_quantized and name in weights.names:
        return _plain(weights.file_of(name), name)
    return _plain(*weights.largest())


def _plain(file: SafetensorsFile, name: str) -> DType:
    """Format of a tensor that is not quantized. Raises :class:`ArtifactError` for one that is."""
    entry = file.entries[name]
    if entry.dtype not in _PLAIN_NAMES:
        raise ArtifactError(f"{file.path}: {name} is {entry.dtype}", f"weights can be read as {', '.join(_PLAIN_NAMES)}", SUPPORTED_MODELS)
    return _PLAIN_NAMES[entry.dtype]
