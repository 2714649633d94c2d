"""The fields of request bodies that the API knows but does not support: refused by name, or accepted because no answer depends on them.

Owns these two tables, and finds the unknown fields of a body. What is done is a field of a body in
:mod:`orchestrator.router.frontend.schema`; `docs/api.md` lists all of them, and a test holds that list to these tables.
"""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Mapping
from typing import Any

import msgspec


class RefusedField(msgspec.Struct, frozen=True, kw_only=True):
    """A field that would change the answer and is not supported. ``why``: for the refusal. ``neutral``: values without effect; null is
    always one."""

    why: str
    neutral: tuple[Any, ...] = ()


#: Fields of OpenAI's chats and completions and of vLLM's additions.
REFUSED: Mapping[str, RefusedField] = {
    "audio": RefusedField(why="only text is generated"),
    "include_reasoning": RefusedField(why="reasoning is not taken out of the answer", neutral=(True,)),
    "kv_transfer_params": RefusedField(why="prefill and decode are not done by different replicas", neutral=({},)),
    "logits_processors": RefusedField(why="a request cannot bring code; use logit_bias, bad_words or a grammar", neutral=([],)),
    "modalities": RefusedField(why="only text is generated", neutral=(["text"], [])),
    "prompt_embeds": RefusedField(why="a prompt is text or token ids", neutral=([],)),
    "structural_tag": RefusedField(why="structural tags are not offered; use tools, or a grammar"),
    "truncation_side": RefusedField(why="truncate_prompt_tokens keeps the end of the prompt", neutral=("left",)),
    "use_beam_search": RefusedField(why="beam search is not offered", neutral=(False,)),
    "verbosity": RefusedField(why="no model here reads it; say it in a message, or in chat_template_kwargs", neutral=("medium",)),
    "vllm_xargs": RefusedField(why="they are for plugins of vLLM", neutral=({},)),
    "web_search_options": RefusedField(why="nothing is fetched"),
}
#: Fields that no answer depends on. They say where or how an answer is computed or kept, or they belong to something that is refused.
HARMLESS = frozenset((
    "early_stopping", "guided_decoding_backend", "length_penalty", "media_io_kwargs", "mm_processor_kwargs", "prediction",
    "prompt_cache_retention", "safety_identifier", "service_tier", "store",
))  # fmt: skip


def refused_field(fields: Mapping[str, Any]) -> tuple[str, str] | None:
    """(name, why) of the first field that requests something unsupported."""
    for name, value in fields.items():
        refused = REFUSED.get(name)
        # A boolean equals an integer in Python, but not in JSON.
        if refused is not None and value is not None and not any(type(value) is type(one) and value == one for one in refused.neutral):
            return name, refused.why
    return None


def unknown_fields(fields: Mapping[str, Any], kind: type[msgspec.Struct]) -> list[str]:
    """The unknown fields, in their order; those of an object in the body as ``stream_options.name``.

    Messages, tools and documents are not checked: a chat template gets them unchanged, so nothing of them is ignored.
    """
    known = kind.__struct_fields__
    found = [name for name in fields if name not in known and name not in REFUSED and name not in HARMLESS]
    return found + _unknown_inside(fields, kind)


def _unknown_inside(fields: Mapping[str, Any], kind: type[msgspec.Struct]) -> list[str]:
    found: list[str] = []
    for name, inner in _objects(kind).items():
        value = fields.get(name)
        if isinstance(value, dict):
            found += [f"{name}.{key}" for key in value if key not in inner.__struct_fields__]
            found += [f"{name}.{path}" for path in _unknown_inside(value, inner)]
    return found


@functools.cache
def _objects(kind: type[msgspec.Struct]) -> dict[str, type[msgspec.Struct]]:
    """The fields of a struct that hold one other struct, by the name in JSON."""
    found: dict[str, type[msgspec.Struct]] = {}
    for field in msgspec.structs.fields(kind):
        members = typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)
        structs = [member for member in members if isinstance(member, type) and issubclass(member, msgspec.Struct)]
        if len(structs) == 1:
            found[field.encode_name] = structs[0]
    return found
