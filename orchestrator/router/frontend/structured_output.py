"""The grammar that a request asks for, given in one of four ways, as one :class:`~workers.protocol.messages.GuideSpec`.

Owns the checks that need no compiler: size, depth, references, explosive patterns. It never follows a reference out of the schema. A
grammar is compiled twice on purpose: in a sandbox process of the router, so that a bad grammar is refused before the request is queued, and
at the replica, because a replica does not trust its routers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from workers.protocol.errors import Rejected
from workers.protocol.messages import GuideSpec

MAX_TEXT = 64 << 10
MAX_DEPTH = 64
MAX_NODES = 10_000
MAX_CHOICES = 1024
MAX_PATTERN = 2048
#: Copies of an atom that nested counted repeats may ask for: {100}{100} is an automaton of 10 000 states.
MAX_COPIES = 4096

_REPEAT = re.compile(r"\{(\d*)(?:,(\d*))?\}")
#: A group of one repeated atom that is itself repeated. It matches what the repeated atom matches, and it makes some matchers explode.
_DOUBLE_REPEAT = re.compile(r"\((?:\?:)?(?:\\.|\[[^\]]*\]|[^()\\\[\]|])[+*]\)[+*{]")


class JsonSchemaFormat(msgspec.Struct, frozen=True, kw_only=True):
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True):
    """vLLM's newer form; the older ``guided_*`` fields are converted to it."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: list[str] | None = None
    json_object: bool | None = None


def invalid(param: str, why: str) -> Rejected:
    return Rejected(f"{param}: {why}", code="invalid_schema", param=param)


def choose(form: ResponseFormat | None, newer: StructuredOutputs | None, older: StructuredOutputs) -> GuideSpec | None:
    """The grammar that was asked for, or None. Raises Rejected on several grammars, and (``invalid_schema``) on a malformed one."""
    found = [*_from_format(form), *_from_structured(newer, "structured_outputs"), *_from_structured(older, "guided")]
    if len(found) > 1:
        raise Rejected("structured output was asked for in more than one way", param="response_format")
    return found[0] if found else None


def from_schema(schema: dict[str, Any], param: str) -> GuideSpec:
    _check_schema(schema, param)
    return GuideSpec(kind="json_schema", text=_bounded(msgspec.json.encode(schema).decode(), param))


def _from_format(form: ResponseFormat | None) -> Iterator[GuideSpec]:
    if form is None or form.type == "text":
        return
    if form.type == "json_object":
        yield GuideSpec(kind="json")
        return
    if form.json_schema is None or form.json_schema.schema is None:
        raise Rejected("response_format.json_schema: json_schema needs a schema", param="response_format.json_schema")
    yield from_schema(form.json_schema.schema, "response_format")


def _from_structured(wanted: StructuredOutputs | None, name: str) -> Iterator[GuideSpec]:
    if wanted is None:
        return
    prefix = name + ("_" if name == "guided" else ".")
    if wanted.json is not None:
        yield from_schema(_decoded(wanted.json, prefix + "json"), prefix + "json")
    if wanted.regex is not None:
        _check_pattern(wanted.regex, prefix + "regex")
        yield GuideSpec(kind="regex", text=wanted.regex)
    if wanted.grammar is not None:
        yield GuideSpec(kind="grammar", text=_bounded(wanted.grammar, prefix + "grammar"))
    if wanted.choice is not None:
        if not 1 <= len(wanted.choice) <= MAX_CHOICES or not all(wanted.choice):
            raise invalid(prefix + "choice", f"needs 1 to {MAX_CHOICES} strings, none of them empty")
        yield GuideSpec(kind="choice", text=_bounded(msgspec.json.encode(wanted.choice).decode(), prefix + "choice"))
    if wanted.json_object:
        yield GuideSpec(kind="json")


def _decoded(schema: str | dict[str, Any], param: str) -> dict[str, Any]:
    if not isinstance(schema, str):
        return schema
    try:
        return msgspec.json.decode(_bounded(schema, param), type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise invalid(param, f"not a JSON object: {str(error)[:120]}") from None


def _bounded(text: str, param: str) -> str:
    if not text or len(text) > MAX_TEXT:
        raise invalid(param, f"has {len(text)} characters, must have 1 to {MAX_TEXT}")
    return text


def _check_pattern(pattern: str, param: str) -> None:
    if not 1 <= len(pattern) <= MAX_PATTERN:
        raise invalid(param, f"a pattern has 1 to {MAX_PATTERN} characters")
    copies = 1
    for low, high in _REPEAT.findall(pattern):
        copies *= max(1, int((high or low or "1")[:9]))
    if copies > MAX_COPIES or _DOUBLE_REPEAT.search(pattern):
        raise invalid(param, "the pattern's nested repeats multiply too far")


def _check_schema(schema: dict[str, Any], param: str) -> None:
    """Bounds on size and depth; references stay inside, exist, and do not recur (a recursive schema has no bounded output)."""
    nodes = 0
    checked: set[str] = set()

    def walk(node: Any, depth: int, open_refs: frozenset[str]) -> None:
        nonlocal nodes
        nodes += 1
        if depth > MAX_DEPTH or nodes > MAX_NODES:
            raise invalid(param, f"the schema is deeper than {MAX_DEPTH} levels or has more than {MAX_NODES} parts")
        if isinstance(node, list):
            for item in node:
                walk(item, depth + 1, open_refs)
            return
        if not isinstance(node, dict):
            return
        target = node.get("$ref")
        if isinstance(target, str):
            if target in open_refs:
                raise invalid(param, f"the reference {target[:64]!r} is recursive")
            if target not in checked:
                walk(_resolve(schema, target, param), depth + 1, open_refs | {target})
                checked.add(target)
        if isinstance(pattern := node.get("pattern"), str):
            _check_pattern(pattern, param)
        for key, item in node.items():
            # Definitions are checked where they are used; an unused definition does not matter.
            if key not in ("$defs", "definitions"):
                walk(item, depth + 1, open_refs)

    walk(schema, 0, frozenset(("#",)))


def _resolve(schema: dict[str, Any], target: str, param: str) -> Any:
    if not target.startswith("#"):
        raise invalid(param, "references out of the schema are not followed")
    node: Any = schema
    for part in target.removeprefix("#").split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(node, dict) or key not in node:
            raise invalid(param, f"the reference {target[:64]!r} leads nowhere")
        node = node[key]
    return node
