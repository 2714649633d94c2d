"""Grammars over a real tokenizer file: what is allowed, what is refused, and going back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.guide_writer import VOCAB, allowed, fits, write
from tests.support.tiny_models import IM_END, tiny_tokenizer
from workers.protocol.errors import ArtifactError, EngineFault, Rejected
from workers.protocol.messages import GuideSpec
from workers.sampling.guide import GuideFactory
from workers.sampling.llguidance_guide import MAX_CHOICES, MAX_TEXT, guide_factory


@pytest.fixture(scope="module")
def factory(tmp_path_factory: pytest.TempPathFactory) -> GuideFactory:
    return guide_factory(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")) / "tokenizer.json", VOCAB, (IM_END,))


def test_a_schema_is_followed(factory: GuideFactory) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}, "ok": {"type": "boolean"}}, "required": ["n", "ok"]}
    schema["additionalProperties"] = False
    for seed in range(4):
        found = json.loads(write(factory(GuideSpec(kind="json_schema", text=json.dumps(schema))), seed))
        assert isinstance(found["n"], int) and isinstance(found["ok"], bool)


def test_every_kind_compiles_and_restrains(factory: GuideFactory) -> None:
    assert allowed(factory(GuideSpec(kind="choice", text='["yes","no"]'))) == sorted(b"yn")
    assert allowed(factory(GuideSpec(kind="regex", text="[a-c]{2}"))) == sorted(b"abc")
    assert allowed(factory(GuideSpec(kind="grammar", text='start: "x" | "y"'))) == sorted(b"xy")
    assert ord("{") in allowed(factory(GuideSpec(kind="json"))) and ord("[") not in allowed(factory(GuideSpec(kind="json")))


def test_done_and_advance(factory: GuideFactory) -> None:
    guide = factory(GuideSpec(kind="choice", text='["no","not \\"x\\""]'))
    guide.advance(list(b"no"))
    assert not guide.done() and IM_END in allowed(guide) and ord("t") in allowed(guide)
    guide.advance(list(b't "x"'))
    assert guide.done()
    with pytest.raises(EngineFault, match="does not allow"):
        guide.advance(list(b"z"))


XS = '{"type":"object","properties":{"xs":{"type":"array","items":{"type":"integer"}}},"required":["xs"],"additionalProperties":false}'
COMPACT, SPACED, INDENTED = '{"xs":[1,2]}', '{"xs": [1, 2]}', '{\n  "xs": [\n    1,\n    2\n  ]\n}'


@pytest.mark.parametrize(
    ("whitespace", "taken", "refused"),
    [
        (None, [COMPACT, SPACED, INDENTED], ['{"xs":  [1]}', '{"xs":[1\n\n]}', "{\n" + " " * 17 + '"xs":[]}', '{"xs":[1] \n}']),
        ("", [COMPACT], [SPACED, INDENTED]),
        (" ?", [COMPACT, SPACED], [INDENTED]),
        (r"[\n ]*", [COMPACT, SPACED, INDENTED, '{"xs":   \n\n [1]}'], ['{"xs":\t[1]}']),
    ],
)
def test_white_space_in_json_is_bounded_unless_the_request_says_otherwise(
    factory: GuideFactory, whitespace: str | None, taken: list[str], refused: list[str]
) -> None:
    spec = GuideSpec(kind="json_schema", text=XS, whitespace=whitespace)
    assert [fits(factory(spec), text) for text in taken + refused] == [True] * len(taken) + [False] * len(refused)


def test_white_space_of_any_json_object_is_bounded(factory: GuideFactory) -> None:
    assert fits(factory(GuideSpec(kind="json")), '{"a": {}}') and not fits(factory(GuideSpec(kind="json")), '{"a":  {}}')
    assert not fits(factory(GuideSpec(kind="json", whitespace="")), '{"a": {}}')


@pytest.mark.parametrize(
    ("regex", "taken", "refused"),
    [
        (r"^\d{3}-\d{4}$", "555-0123", "٣٣٣-٣٣٣٣"),
        (r"[\d.]+", "1.2", "١"),
        (r"\w+\s\w+", "ab_1 c", "né c"),
        (r"\S", "x", " "),
        (r"\\d", r"\d", "1"),
        (r"[^\W\d]+", "ab", "1"),
    ],
)
def test_classes_of_a_regex_are_of_ascii_as_in_a_pattern(factory: GuideFactory, regex: str, taken: str, refused: str) -> None:
    """Oracle: ECMA-262, which JSON schema reads patterns with."""
    assert fits(factory(GuideSpec(kind="regex", text=regex)), taken) and not fits(factory(GuideSpec(kind="regex", text=regex)), refused)
    pattern = json.dumps({"type": "string", "pattern": "^(" + regex.strip("^$") + ")$"})
    quoted = [json.dumps(text, ensure_ascii=False) for text in (taken, refused)]
    assert [fits(factory(GuideSpec(kind="json_schema", text=pattern)), text) for text in quoted] == [True, False]


def test_a_grammar_that_is_too_large_to_follow_is_no_whole_answer(tmp_path: Path) -> None:
    """The automaton is built while a mask is made; with long tokens a mask looks far ahead. Then only the end is left."""
    file = tiny_tokenizer(tmp_path) / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"] |= {"a" * length: IM_END + length for length in range(2, 60)}
    file.write_text(json.dumps(tokenizer))
    factory = guide_factory(file, VOCAB, (IM_END,))
    with pytest.raises(Rejected, match="cannot be followed"):
        factory(GuideSpec(kind="regex", text="((a{1,60}){1,60}){1,60}"))
    guide = factory(GuideSpec(kind="regex", text="b((a{1,60}){1,60}){1,60}"))
    guide.advance([ord("b")])
    assert allowed(guide) == [IM_END]
    with pytest.raises(EngineFault, match="too many expressions"):
        guide.advance([IM_END])


def test_the_end_is_a_token_of_the_grammar(factory: GuideFactory) -> None:
    guide = factory(GuideSpec(kind="regex", text="a+"))
    guide.advance([ord("a")])
    guide.advance([IM_END])
    with pytest.raises(EngineFault):
        factory(GuideSpec(kind="regex", text="a+")).advance([IM_END])


@pytest.mark.parametrize(
    "spec",
    [
        GuideSpec(kind="json_schema", text="{"),
        GuideSpec(kind="json_schema", text='{"type": "nothing"}'),
        GuideSpec(kind="regex", text="("),
        GuideSpec(kind="grammar", text="start: missing"),
        GuideSpec(kind="choice", text='"yes"'),
        GuideSpec(kind="choice", text="[]"),
        GuideSpec(kind="choice", text=json.dumps(["x"] * (MAX_CHOICES + 1))),
        GuideSpec(kind="regex", text="a" * (MAX_TEXT + 1)),
    ],
)
def test_what_means_nothing_is_the_callers_fault(factory: GuideFactory, spec: GuideSpec) -> None:
    with pytest.raises(Rejected) as caught:
        factory(spec)
    assert caught.value.code == "invalid_schema" and caught.value.why


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        guide_factory(tmp_path / "tokenizer.json", VOCAB, ())
