"""The grammar that a request asks for, given in one of four ways, as one :class:`~workers.protocol.messages.GuideSpec`.

Owns the checks that need no compiler; :mod:`orchestrator.router.frontend.json_schema` makes those of schemas. A grammar is compiled twice
on purpose: in a sandbox process of the router, so that a bad grammar is refused before the request is queued, and at the replica, because a
replica does not trust its routers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec

from orchestrator.router.frontend.chat_messages import ToolFunction
from orchestrator.router.frontend.json_schema import Definitions, directives, invalid
from orchestrator.router.frontend.pattern_size import PatternTooLarge, check_pattern
from workers.protocol.errors import Rejected
from workers.protocol.messages import GuideSpec

MAX_TEXT = 64 << 10
MAX_CHOICES = 1024
MAX_WHITESPACE = 256
#: The schema of the arguments of a function without parameters, and their one text.
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
EMPTY_OBJECT = GuideSpec(kind="choice", text='["{}"]')
#: Keywords that let properties into an object that declares none: where they say something, and where they do not say false.
_OPENING = frozenset((
    "patternProperties", "$ref", "anyOf", "oneOf", "allOf", "if", "dependentSchemas", "minProperties", "required", "const", "enum",
))  # fmt: skip
_OPENING_UNLESS_FALSE = ("additionalProperties", "unevaluatedProperties")


class JsonSchemaFormat(msgspec.Struct, frozen=True, kw_only=True):
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True):
    """``schema``: of a ``json_object``, where servers before ``json_schema`` took it."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    schema: dict[str, Any] | None = None


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """vLLM's newer form; the older ``guided_*`` fields are converted to it. ``whitespace_pattern``: what may stand between the tokens of
    JSON; ``disable_any_whitespace``: nothing may. ``disable_additional_properties``: objects take the properties alone that their schema
    names. ``disable_fallback``: there is nothing to fall back to. Every field changes the answer, so an unknown one is refused."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: list[str] | None = None
    json_object: bool | None = None
    structural_tag: Any = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    disable_fallback: bool | None = None


def choose(
    form: ResponseFormat | None, newer: StructuredOutputs | None, older: StructuredOutputs, call: GuideSpec | None = None
) -> GuideSpec | None:
    """The grammar that was asked for, or None. ``call``: the grammar of a forced tool call. Raises Rejected on several grammars, and
    (``invalid_schema``) on a malformed one."""
    newer = newer or StructuredOutputs()
    found = [*_from_format(form), *_from_structured(newer, "structured_outputs."), *_from_structured(older, "guided_")]
    if call is not None and found:
        raise Rejected("tool_choice: a forced tool call and another output format exclude each other", param="tool_choice")
    if len(found) > 1:
        raise Rejected("structured output was asked for in more than one way", param="response_format")
    guide = found[0] if found else call
    param, whitespace = _whitespace(newer, older)
    if whitespace is None or guide is EMPTY_OBJECT:
        return guide
    if guide is None or guide.kind not in ("json", "json_schema"):
        raise Rejected(f"{param}: needs an output format that is JSON", param=param)
    return msgspec.structs.replace(guide, whitespace=whitespace)


def arguments_guide(function: ToolFunction) -> GuideSpec:
    """The grammar of the arguments of ``function``. Raises Rejected (``invalid_schema``)."""
    parameters = _parameters(function)
    if parameters == NO_PARAMETERS:
        return EMPTY_OBJECT
    definitions = Definitions("tools")
    return _guide({**directives(parameters), **definitions.complete(definitions.localize(parameters))}, "tools")


def call_guide(functions: Sequence[ToolFunction]) -> GuideSpec:
    """The grammar of one call of any of ``functions``: an object with its name and its arguments. Raises Rejected (``invalid_schema``)."""
    definitions = Definitions("tools")
    calls = []
    for function in functions:
        properties = {"name": {"const": function.name}, "arguments": definitions.localize(_parameters(function))}
        calls.append({"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False})
    return _guide(definitions.complete({"anyOf": calls}), "tools")


def _parameters(function: ToolFunction) -> dict[str, Any]:
    """The schema of a function's arguments. As in OpenAI's API, a function that declares no parameters has an empty list of them."""
    parameters = function.parameters or {}
    opened = any(parameters.get(key) for key in _OPENING) or any(parameters.get(key, False) is not False for key in _OPENING_UNLESS_FALSE)
    if parameters.get("type", "object") != "object" or parameters.get("properties") or opened:
        return parameters
    return NO_PARAMETERS


def _whitespace(newer: StructuredOutputs, older: StructuredOutputs) -> tuple[str, str | None]:
    """The field that says what may stand between the tokens of JSON, and its pattern; None = none says it."""
    asked = {
        "structured_outputs.whitespace_pattern": newer.whitespace_pattern,
        "structured_outputs.disable_any_whitespace": "" if newer.disable_any_whitespace else None,
        "guided_whitespace_pattern": older.whitespace_pattern,
    }
    given = [(param, pattern) for param, pattern in asked.items() if pattern is not None]
    if len(given) > 1:
        raise Rejected(f"{given[1][0]}: {given[0][0]} says it already", param=given[1][0])
    if not given:
        return "", None
    param, pattern = given[0]
    if len(pattern) > MAX_WHITESPACE:
        raise invalid(param, f"a pattern has at most {MAX_WHITESPACE} characters")
    if pattern:
        _check_pattern(pattern, param)
    return param, pattern


def _from_format(form: ResponseFormat | None) -> Iterator[GuideSpec]:
    if form is None:
        return
    if form.schema is not None and form.type != "json_object":
        param = "response_format.schema"
        raise Rejected(f"{param}: belongs to json_object; a json_schema has its schema in json_schema.schema", param=param)
    if form.type == "text":
        return
    if form.type == "structural_tag":
        param = "response_format.type"
        raise Rejected(f"{param}: structural tags are not offered; use tools, or a grammar", code="unsupported", param=param)
    if form.type == "json_object":
        yield GuideSpec(kind="json") if form.schema is None else _schema_guide(form.schema, "response_format")
        return
    if form.json_schema is None or form.json_schema.schema is None:
        raise Rejected("response_format.json_schema: json_schema needs a schema", param="response_format.json_schema")
    yield _schema_guide(form.json_schema.schema, "response_format")


def _from_structured(wanted: StructuredOutputs, prefix: str) -> Iterator[GuideSpec]:
    if wanted.structural_tag is not None:
        param = prefix + "structural_tag"
        raise Rejected(f"{param}: not offered; use tools, or a grammar", code="unsupported", param=param)
    if wanted.json is not None:
        param = prefix + "json"
        yield _schema_guide(_decoded(wanted.json, param), param, closed=bool(wanted.disable_additional_properties))
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


def _schema_guide(schema: dict[str, Any], param: str, *, closed: bool = False) -> GuideSpec:
    definitions = Definitions(param, closed=closed)
    return _guide({**directives(schema), **definitions.complete(definitions.localize(schema))}, param)


def _guide(schema: dict[str, Any], param: str) -> GuideSpec:
    return GuideSpec(kind="json_schema", text=_bounded(msgspec.json.encode(schema).decode(), param))


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
    try:
        check_pattern(pattern)
    except PatternTooLarge as error:
        raise invalid(param, str(error)) from None
