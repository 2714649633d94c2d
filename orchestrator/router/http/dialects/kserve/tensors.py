"""From the requests of Triton's clients to the body of a completion: named tensors and parameters, as TensorRT-LLM's backend names them.

Owns the names and the form of the tensors, and refuses those that have no meaning here. The values are checked with every other body
(:mod:`orchestrator.router.frontend.schema`). Pure: it knows no sockets, models or tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import msgspec

from orchestrator.router.frontend.schema import MAX_NAME, MAX_PROMPTS, convert, refuse
from workers.protocol.errors import Rejected

Kind = Literal["text", "integer", "number", "flag"]

_DATATYPES: dict[Kind, tuple[str, ...]] = {
    "text": ("BYTES",),
    "integer": ("INT32", "INT64", "INT8", "INT16", "UINT8", "UINT16", "UINT32", "UINT64"),
    "number": ("FP32", "FP64", "FP16", "BF16"),
    "flag": ("BOOL",),
}
_TYPES: dict[Kind, tuple[type, ...]] = {"text": (str,), "integer": (int,), "number": (int, float), "flag": (bool,)}
_SHOWN: dict[Kind, str] = {"text": "a text", "integer": "an integer", "number": "a number", "flag": "true or false"}
_MAX_DIMS, _MAX_TENSORS = 4, 64
_UINT64 = 2**64


class Input(msgspec.Struct, frozen=True):
    """An input tensor. ``field``: its name in the body of a completion, empty where this module handles it. ``many``: it is a list."""

    kind: Kind
    field: str = ""
    many: bool = False
    datatype: str = ""

    def shown_type(self) -> str:
        """The datatype in the metadata of the model; every other datatype of the kind is accepted too."""
        return self.datatype or _DATATYPES[self.kind][0]


INPUTS: Mapping[str, Input] = {
    "text_input": Input("text", "prompt"),
    "max_tokens": Input("integer", "max_tokens"),
    "min_tokens": Input("integer", "min_tokens"),
    "min_length": Input("integer", "min_tokens"),
    "stop_words": Input("text", many=True),
    "bad_words": Input("text", many=True),
    "end_id": Input("integer"),
    "pad_id": Input("integer"),
    "temperature": Input("number", "temperature"),
    "top_k": Input("integer", "top_k"),
    "top_p": Input("number", "top_p"),
    "min_p": Input("number", "min_p"),
    "length_penalty": Input("number"),
    "repetition_penalty": Input("number", "repetition_penalty"),
    "presence_penalty": Input("number", "presence_penalty"),
    "frequency_penalty": Input("number", "frequency_penalty"),
    "random_seed": Input("integer", datatype="UINT64"),
    "seed": Input("integer", datatype="UINT64"),
    "ignore_eos": Input("flag", "ignore_eos"),
    "beam_width": Input("integer"),
    "num_return_sequences": Input("integer"),
    "return_log_probs": Input("flag"),
    "return_context_logits": Input("flag"),
    "return_generation_logits": Input("flag"),
    "exclude_input_in_output": Input("flag"),
    "stream": Input("flag"),
    "guided_decoding_guide_type": Input("text"),
    "guided_decoding_guide": Input("text"),
}
#: Name -> (datatype, dimensions after the batch's).
OUTPUTS: Mapping[str, tuple[str, list[int]]] = {
    "text_output": ("BYTES", [1]),
    "cum_log_probs": ("FP32", [1]),
    "output_log_probs": ("FP32", [1, -1]),
}
#: Inputs of TensorRT-LLM's backend that are refused here, because ignoring them would change the answer.
_NOT_OFFERED = frozenset((
    "return_context_logits", "return_generation_logits", "decoder_text_input", "image_input", "image_bytes_input",
    "image_url_input", "video_bytes_input", "prompt_embedding_table", "prompt_vocab_size", "embedding_bias_words",
    "embedding_bias_weights", "num_draft_tokens", "use_draft_logits", "draft_input_ids", "lora_task_id", "lora_weights", "lora_config",
))  # fmt: skip
#: Parameters of Triton's protocol itself, which a model never sees.
_PROTOCOL = frozenset(("binary_data_output", "sequence_id", "sequence_start", "sequence_end", "priority", "timeout"))
_GUIDES = {"json_schema": "guided_json", "regex": "guided_regex", "ebnf_grammar": "guided_grammar"}


class TensorRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request as the ``fields`` of a completion. ``spelled``: field -> the caller's name of it. ``stream`` None: not given. ``echo``: the
    answer begins with the prompt. ``outputs``: the tensors that were asked for, in order."""

    fields: dict[str, Any]
    spelled: dict[str, str]
    id: str = ""
    stream: bool | None = None
    echo: bool = False
    outputs: tuple[str, ...] = ("text_output",)

    def respell(self, error: Rejected) -> Rejected:
        """The same error with the caller's names of the fields."""
        found = re.match(r"\w+", error.param or "")
        name = self.spelled.get(found[0]) if found else None
        if found is None or name is None or name == found[0]:
            return error
        word = re.compile(rf"^{found[0]}\b|(?<=`\$\.){found[0]}\b")
        return type(error)(word.sub(name, error.what), error.why, error.hint, code=error.code, param=word.sub(name, error.param or ""))


class _Tensor(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    shape: list[int]
    datatype: str
    data: list[Any] | None = None
    parameters: dict[str, Any] = {}


class _Wanted(msgspec.Struct, frozen=True, kw_only=True):
    name: str


class _InferBody(msgspec.Struct, frozen=True, kw_only=True):
    inputs: list[_Tensor]
    outputs: list[_Wanted] | None = None
    id: str = ""
    parameters: dict[str, Any] = {}


class _GenerateBody(msgspec.Struct, frozen=True, kw_only=True):
    text_input: str
    id: str = ""
    parameters: dict[str, Any] = {}


def read_generate(fields: dict[str, Any], model: str, on_unknown: Callable[[list[str]], None]) -> TensorRequest:
    """A body of ``generate`` or ``generate_stream``; parameters may also stand beside ``text_input``. Raises Rejected."""
    body = convert(fields, _GenerateBody)
    beside = {name: value for name, value in fields.items() if name not in ("text_input", "id", "parameters")}
    named = _merged((beside, body.parameters), on_unknown)
    if "text_input" in named:
        refuse("text_input", "belongs beside the parameters")
    for name, value in named.items():
        _check_kind(name, value)
    return _ask({"text_input": body.text_input, **named}, model, body.id, ())


def read_infer(fields: dict[str, Any], model: str, on_unknown: Callable[[list[str]], None]) -> TensorRequest:
    """A body of ``infer``: JSON tensors, the rows of ``text_input`` being one prompt each. Raises Rejected."""
    body = convert(fields, _InferBody)
    if len(body.inputs) > _MAX_TENSORS:
        refuse("inputs", f"{len(body.inputs)} tensors are more than {_MAX_TENSORS}")
    tensors = {tensor.name: tensor for tensor in body.inputs}
    if len(tensors) != len(body.inputs):
        refuse("inputs", "two tensors have the same name")
    if "text_input" not in tensors:
        refuse("text_input", "the tensor is missing")
    prompts = _flat(tensors["text_input"])
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        refuse("text_input", f"a batch has 1 to {MAX_PROMPTS} prompts, got {len(prompts)}")
    values: dict[str, Any] = {name: _value(tensor, len(prompts)) for name, tensor in tensors.items() if name != "text_input"}
    named = _merged((values, body.parameters), on_unknown)
    for name, value in named.items():
        _check_kind(name, value)
    wanted = tuple(dict.fromkeys(output.name for output in body.outputs or ()))
    for name in wanted:
        if name not in OUTPUTS:
            refuse("outputs", f"no output is named {name[:64]!r}; there are {', '.join(OUTPUTS)}")
    return _ask({"text_input": prompts, **named}, model, body.id, wanted)


def _merged(parts: Iterable[Mapping[str, Any]], on_unknown: Callable[[list[str]], None]) -> dict[str, Any]:
    """The known names of all parts. Raises Rejected for a name in two of them."""
    found: dict[str, Any] = {}
    unknown: list[str] = []
    for part in parts:
        for name, value in part.items():
            if name in found:
                refuse(name[:MAX_NAME], "given twice")
            if name in INPUTS or name in _NOT_OFFERED:
                found[name] = value
            elif name not in _PROTOCOL:
                unknown.append(name)
    if unknown:
        on_unknown(unknown)
    return found


def _check_kind(name: str, value: Any) -> None:
    values = value if isinstance(value, list) else [value]
    if name in _NOT_OFFERED:
        if any(values):
            refuse(name, "not offered here")
        return
    known = INPUTS[name]
    if (isinstance(value, list) and not known.many) or any(type(one) not in _TYPES[known.kind] for one in values):
        refuse(name, f"must be {_SHOWN[known.kind]}{' or a list of such' if known.many else ''}")


def _value(tensor: _Tensor, rows: int) -> Any:
    """The value of an input, or its list. Every row of a batch must have the same value."""
    name = tensor.name
    known = INPUTS.get(name)
    if known is None:
        return _flat(tensor) if name in _NOT_OFFERED else None
    flat = _flat(tensor)
    if known.many:
        if len(tensor.shape) > 1 and tensor.shape[0] == rows > 1:
            width = len(flat) // rows
            if flat != flat[:width] * rows:
                refuse(name, "differs among the rows of the batch; send these as requests of their own")
            return flat[:width]
        return flat
    if len(flat) not in (1, rows) or any(value != flat[0] for value in flat):
        refuse(name, "takes one value for the whole batch; send rows that differ as requests of their own")
    return flat[0]


def _flat(tensor: _Tensor) -> list[Any]:
    """The elements in row-major order, of the right number and type. Raises Rejected."""
    name = tensor.name[:MAX_NAME]
    if tensor.data is None or "binary_data_size" in tensor.parameters:
        refuse(name, "binary tensors are not taken; send its data as JSON (binary_data=False)")
    if not 1 <= len(tensor.shape) <= _MAX_DIMS or min(tensor.shape) < 0:
        refuse(name, f"a shape has 1 to {_MAX_DIMS} dimensions, none of them negative")
    flat: list[Any] = tensor.data
    for _ in range(_MAX_DIMS - 1):
        if not any(isinstance(item, list) for item in flat):
            break
        flat = [inner for item in flat for inner in (item if isinstance(item, list) else [item])]
    if len(flat) != math.prod(tensor.shape):
        refuse(name, f"the shape says {str(math.prod(tensor.shape))[:20]} elements, the data has {len(flat)}")
    known = INPUTS.get(tensor.name)
    if known is not None:
        if tensor.datatype not in _DATATYPES[known.kind]:
            refuse(name, f"is a tensor of {known.shown_type()}, got {tensor.datatype[:16]!r}")
        if any(type(value) not in _TYPES[known.kind] for value in flat):
            refuse(name, f"holds data that is not {tensor.datatype}")
    return flat


def _ask(named: dict[str, Any], model: str, id: str, wanted: tuple[str, ...]) -> TensorRequest:
    if len(id) > MAX_NAME or not id.isprintable():
        refuse("id", f"an id has at most {MAX_NAME} printable characters")
    fields: dict[str, Any] = {"model": model}
    spelled: dict[str, str] = {}

    def put(name: str, field: str, value: Any) -> None:
        if field in fields:
            refuse(name, f"says the same as {spelled[field]}")
        fields[field], spelled[field] = value, name

    for name, value in named.items():
        if name in INPUTS and INPUTS[name].field:
            put(name, INPUTS[name].field, value)
    _put_special(named, put)
    log_probs = bool(named.get("return_log_probs"))
    if log_probs or any(name != "text_output" for name in wanted):
        fields["logprobs"] = 0
    return TensorRequest(
        fields=fields,
        spelled=spelled,
        id=id,
        stream=named.get("stream"),
        echo=named.get("exclude_input_in_output") is False,
        outputs=wanted or (tuple(OUTPUTS) if log_probs else ("text_output",)),
    )


def _put_special(named: Mapping[str, Any], put: Callable[[str, str, Any], None]) -> None:
    """The inputs whose values have another form in the body of a completion."""
    for name in ("beam_width", "num_return_sequences"):
        if named.get(name, 1) != 1:
            refuse(name, "answers come one a prompt")
    for name, field in (("stop_words", "stop"), ("bad_words", "bad_words")):
        words = named.get(name, [])
        if given := [word for word in ([words] if isinstance(words, str) else words) if word]:
            put(name, field, given)
    for name in ("random_seed", "seed"):
        if name in named:
            seed = named[name]
            put(name, "seed", seed - _UINT64 if _UINT64 // 2 <= seed < _UINT64 else seed)
    end = named.get("end_id")
    if end == -1:
        put("end_id", "ignore_eos", True)
    elif end is not None:
        put("end_id", "stop_token_ids", [end])
    _put_guide(named.get("guided_decoding_guide_type"), named.get("guided_decoding_guide"), put)


def _put_guide(kind: str | None, guide: str | None, put: Callable[[str, str, Any], None]) -> None:
    if kind == "json" and guide is None:
        put("guided_decoding_guide_type", "response_format", {"type": "json_object"})
    elif kind in _GUIDES and guide is not None:
        put("guided_decoding_guide", _GUIDES[kind], guide)
    elif kind is not None or guide is not None:
        refuse("guided_decoding_guide_type", f"must be json, or one of {', '.join(_GUIDES)} together with guided_decoding_guide")
