"""Schemas as requests bring them: what the grammar writes fits the schema, wherever the schema stands in the request."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from orchestrator.router.frontend import structured_output
from orchestrator.router.frontend.chat_messages import ToolFunction
from orchestrator.router.frontend.structured_output import StructuredOutputs
from tests.support.guide_writer import VOCAB, fits, write
from tests.support.source_tree import ROOT
from tests.support.tiny_models import IM_END, tiny_tokenizer
from workers.protocol.errors import Rejected
from workers.protocol.messages import GuideSpec
from workers.sampling.guide import GuideFactory
from workers.sampling.llguidance_guide import check_grammar, guide_factory

#: What pydantic makes of nested, generic, recursive, discriminated and patterned models.
PYDANTIC: dict[str, Any] = json.loads((ROOT / "tests/reference/pydantic_schemas.json").read_text())
#: References as JSON pointers (RFC 6901) in all their spellings, with a value that fits and one that does not.
REFERENCES = {
    "percent": ({"$defs": {"Box[int]": {"type": "integer"}}, "$ref": "#/$defs/Box%5Bint%5D"}, "1", '"a"'),
    "not escaped": ({"$defs": {"Box[int]": {"type": "integer"}}, "$ref": "#/$defs/Box[int]"}, "1", '"a"'),
    "slash": ({"$defs": {"a/b~c": {"type": "integer"}}, "$ref": "#/$defs/a~1b~0c"}, "1", '"a"'),
    "percent in a name": ({"$defs": {"50%": {"type": "integer"}}, "$ref": "#/$defs/50%25"}, "1", '"a"'),
    "space": ({"definitions": {"my type": {"type": "integer"}}, "$ref": "#/definitions/my%20type"}, "1", '"a"'),
    "array": ({"anyOf": [{"const": "x"}, {"type": "array", "items": {"$ref": "#/anyOf/0"}, "minItems": 1}]}, '["x"]', '["y"]'),
    "tuple": ({"type": "array", "prefixItems": [{"const": 1}, {"$ref": "#/prefixItems/0"}], "items": False}, "[1,1]", "[1,2]"),
    "unknown place": ({"components": {"schemas": {"P": {"const": 5}}}, "$ref": "#/components/schemas/P"}, "5", "6"),
    "property": ({"type": "object", "properties": {"$ref": {"const": 1}}, "required": ["$ref"]}, '{"$ref": 1}', '{"$ref": 2}'),
    "anchor": ({"$defs": {"A": {"$anchor": "here", "const": 1}}, "$ref": "#here"}, "1", "2"),
    "own address": ({"$id": "https://x.test/s.json", "$defs": {"A": {"const": 1}}, "$ref": "https://x.test/s.json#/$defs/A"}, "1", "2"),
    "bundled": ({"$id": "https://x.test/s.json", "$defs": {"A": {"$id": "a.json", "const": 1}}, "$ref": "a.json"}, "1", "2"),
    "own root": ({"$defs": {"A": {"$id": "urn:x:a", "$defs": {"B": {"const": 1}}, "$ref": "#/$defs/B"}}, "$ref": "#/$defs/A"}, "1", "2"),
    "root": ({"type": "array", "items": {"$ref": "#"}}, "[[],[[]]]", "[1]"),
    "chain": ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/c"}, "c": {"const": 1}}, "$ref": "#/$defs/a"}, "1", "2"),
    "true": ({"type": "array", "items": {"$ref": "#/$defs/any"}, "$defs": {"any": True}}, '[1,"a"]', "{}"),
    "data": (
        {"type": "object", "properties": {"a": {"const": {"$ref": "#/no"}}, "b": {"enum": [{"$ref": 1}], "default": {"$ref": "no"}}},
         "required": ["a"], "examples": [{"$ref": "#/no"}], "additionalProperties": False},
        '{"a": {"$ref": "#/no"}}', '{"a": {}}',
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def factory(tmp_path_factory: pytest.TempPathFactory) -> GuideFactory:
    return guide_factory(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")) / "tokenizer.json", VOCAB, (IM_END,))


def schema_guide(schema: dict[str, Any], **options: Any) -> GuideSpec:
    guide = structured_output.choose(None, StructuredOutputs(json=schema, **options), StructuredOutputs())
    assert guide is not None
    check_grammar(guide)
    return guide


def tool(schema: dict[str, Any] | None, name: str = "f") -> ToolFunction:
    return ToolFunction(name=name, parameters=schema)


@pytest.mark.parametrize("name", PYDANTIC)
def test_what_is_written_fits_the_model(factory: GuideFactory, name: str) -> None:
    schema = PYDANTIC[name]
    validator = jsonschema.Draft202012Validator(schema)
    written = 0
    other = {"type": "object", "properties": {"x": {"$ref": "#/$defs/Place"}}, "$defs": {"Place": {"const": 1}}, "required": ["x"]}
    guides = [(schema_guide(schema), False), (structured_output.call_guide([tool(schema), tool(other, "g")]), True)]
    if schema.get("type", "object") == "object":
        guides.append((structured_output.arguments_guide(tool(schema)), False))
    for guide, called in guides:
        for seed in range(6):
            try:
                found = json.loads(write(factory(guide), seed, 600))
            except ValueError:
                continue  # cut at its length
            if called and found["name"] == "g":
                assert found["arguments"] == {"x": 1}, "the other tool's definitions are its own"
                continue
            validator.validate(found["arguments"] if called else found)
            written += 1
    assert written >= 4


@pytest.mark.parametrize("name", REFERENCES)
def test_references(factory: GuideFactory, name: str) -> None:
    schema, right, wrong = REFERENCES[name]
    jsonschema.validate(json.loads(right), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(json.loads(wrong), schema)
    guide = schema_guide(schema)
    assert fits(factory(guide), right) and not fits(factory(guide), wrong)
    same_names = {"type": "object", "properties": {"p": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"const": 0}}}
    nested = structured_output.call_guide([tool(same_names, "g"), tool(schema)])
    assert fits(factory(nested), f'{{"name": "f", "arguments": {right}}}')
    assert not fits(factory(nested), f'{{"name": "f", "arguments": {wrong}}}')


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"$ref": "#"}, "recursive"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}]}, "b": {"$ref": "#/$defs/a"}}}, "recursive"),
        ({"type": "object", "properties": {"x": {"$ref": "#"}}, "required": ["x"]}, "recursive"),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "recursive"),
        ({"type": "object", "additionalProperties": {"$ref": "#"}, "minProperties": 1}, "recursive"),
        ({"$ref": "#/$defs/none"}, "leads nowhere"),
        ({"$ref": "#/$defs/a/01", "$defs": {"a": [{}, {}]}}, "leads nowhere"),
        ({"$ref": "#/$defs/a/2", "$defs": {"a": [{}, {}]}}, "leads nowhere"),
        ({"$ref": "#nobody"}, "leads nowhere"),
        ({"$ref": "#/title", "title": "x"}, "no schema"),
        ({"$ref": 5}, "must be a string"),
        ({"$ref": "other.json#/a"}, "out of the schema"),
        ({"$ref": "http://[/"}, "out of the schema"),
        ({"properties": {"a": {"$dynamicRef": "#x"}}}, "not followed"),
        ({"patternProperties": {"((a{1,100}){1,100}){1,100}": {}}}, "multiply"),
    ],
)
def test_what_cannot_be_followed_is_refused(schema: dict[str, Any], why: str) -> None:
    with pytest.raises(Rejected, match=why) as caught:
        schema_guide(schema)
    assert caught.value.code == "invalid_schema" and caught.value.param == "structured_outputs.json"


def test_a_recursion_without_an_end_is_found_at_once() -> None:
    """A chain of 3,000 definitions, each of which needs the next."""
    chain = {f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}, "minItems": 1} for i in range(3000)}
    with pytest.raises(Rejected, match=r"entangled|recursive"):
        structured_output.choose(
            None, StructuredOutputs(json={"$ref": "#/$defs/d0", "$defs": {**chain, "d3000": {"$ref": "#/$defs/d0"}}}), StructuredOutputs()
        )


def test_additional_properties_can_be_left_out(factory: GuideFactory) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "object", "properties": {"b": {"type": "integer"}}}, "c": {"type": "object"}}}
    closed = schema_guide(schema, disable_additional_properties=True)
    assert fits(factory(closed), '{"a":{"b":1},"c":{"d":1}}')
    assert not fits(factory(closed), '{"a":{"d":1}}') and not fits(factory(closed), '{"d":1}')
    assert fits(factory(schema_guide(schema)), '{"a":{"d":1}}')


@pytest.mark.parametrize(
    "parameters",
    [
        None,
        {},
        {"type": "object"},
        {"properties": {}},
        {"type": "object", "properties": {}},
        {"title": "Nothing"},
        {"type": "object", "properties": {}, "required": []},
        {
            "type": "object",
            "properties": {},
            "required": [],
            "additionalProperties": False,
            "$schema": "http://json-schema.org/draft-07/schema#",
        },
        {"type": "object", "minProperties": 0, "patternProperties": {}, "unevaluatedProperties": False},
    ],
)
def test_a_function_without_parameters_is_called_with_none(factory: GuideFactory, parameters: dict[str, Any] | None) -> None:
    arguments = structured_output.arguments_guide(tool(parameters))
    call = structured_output.call_guide([tool(parameters), tool({"type": "object", "properties": {"x": {}}}, "g")])
    assert {write(factory(arguments), seed) for seed in range(5)} == {b"{}"}
    spaced = StructuredOutputs(whitespace_pattern=" ")
    assert structured_output.choose(None, None, spaced, arguments) == arguments, "there is nowhere to put white space"
    assert fits(factory(call), '{"name":"f","arguments":{}}') and not fits(factory(call), '{"name":"f","arguments":{"x":1}}')


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "object", "properties": {"x": {"type": "integer"}}},
        {"type": "object", "additionalProperties": True},
        {"type": "object", "properties": {}, "required": [], "additionalProperties": {}},
        {"type": "object", "additionalProperties": {"type": "integer"}},
        {"type": "object", "patternProperties": {"^[xy]$": {}}},
        {"allOf": [{"properties": {"x": {}}}]},
        {"$ref": "#/$defs/P", "$defs": {"P": {"type": "object"}}},
        {"type": "object", "required": ["x"]},
    ],
)
def test_parameters_that_a_schema_lets_in_are_part_of_a_call(factory: GuideFactory, parameters: dict[str, Any]) -> None:
    jsonschema.validate({"x": 1, "y": 2}, parameters)
    assert fits(factory(structured_output.arguments_guide(tool(parameters))), '{"x":1,"y":2}')


@pytest.mark.parametrize(
    "fields",
    [
        {"newer": StructuredOutputs(json={}, disable_any_whitespace=True)},
        {"newer": StructuredOutputs(json={}, whitespace_pattern="")},
        {"older": StructuredOutputs(json={}, whitespace_pattern="")},
    ],
)
def test_every_spelling_of_white_space(fields: dict[str, StructuredOutputs]) -> None:
    guide = structured_output.choose(None, fields.get("newer"), fields.get("older", StructuredOutputs()))
    assert guide == GuideSpec(kind="json_schema", text="{}", whitespace="")


@pytest.mark.parametrize(
    ("newer", "older", "param"),
    [
        (StructuredOutputs(regex="a", disable_any_whitespace=True), StructuredOutputs(), "structured_outputs.disable_any_whitespace"),
        (None, StructuredOutputs(whitespace_pattern=" "), "guided_whitespace_pattern"),
        (StructuredOutputs(json={}, whitespace_pattern=" "), StructuredOutputs(whitespace_pattern=" "), "guided_whitespace_pattern"),
        (StructuredOutputs(json={}, whitespace_pattern=" " * 300), StructuredOutputs(), "structured_outputs.whitespace_pattern"),
        (StructuredOutputs(structural_tag={"x": 1}), StructuredOutputs(), "structured_outputs.structural_tag"),
    ],
)
def test_a_switch_that_cannot_be_obeyed_is_refused_by_its_name(
    newer: StructuredOutputs | None, older: StructuredOutputs, param: str
) -> None:
    with pytest.raises(Rejected) as caught:
        structured_output.choose(None, newer, older)
    assert caught.value.param == param
