"""Tool parsers: the calls in a choice's text, whatever the pieces in which the text comes.

The oracle of the random texts is their own construction: each is written from its calls and texts.
"""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from orchestrator.router.frontend.chat_messages import ToolRules
from orchestrator.router.frontend.text_models import TOOL_PARSER
from orchestrator.router.frontend.tool_parsers import TOOL_PARSERS, choice_parser
from orchestrator.router.frontend.tool_parsers.events import CallDelta, CallDropped, TextDelta, ToolEvent, whole

NAMES = frozenset(("weather", "time"))
HERMES = TOOL_PARSERS["hermes"]
ROME = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
ROME_READ = ("weather", '{"city": "Rome"}')
Found = tuple[str, list[tuple[str, str]]]


def events(rules: ToolRules, pieces: list[str], *, cut: bool = False) -> list[ToolEvent]:
    parser = choice_parser(rules, HERMES)
    found = [event for piece in pieces for event in parser.feed(piece)]
    return found + parser.finish(cut=cut)


def read(rules: ToolRules, pieces: list[str], *, cut: bool = False) -> Found:
    """(all text that is shown, the calls as (name, arguments)); checks the form of the calls."""
    text, calls = whole(events(rules, pieces, cut=cut))
    assert all(call["type"] == "function" and call["id"].startswith("call_") for call in calls)
    assert len({call["id"] for call in calls}) == len(calls)
    return text, [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


def joined(found: list[ToolEvent]) -> list[Any]:
    """What does not depend on where the text was cut: neighbouring pieces of one text or call are one."""
    parts: list[Any] = []
    for event in found:
        if isinstance(event, TextDelta):
            key, text = "text", event.text
        elif isinstance(event, CallDropped):
            key, text = f"drop {event.index}", ""
        else:
            key, text = f"call {event.index}", f"<{event.name}>" * bool(event.id) + event.arguments
        if parts and parts[-1][0] == key:
            parts[-1][1] += text
        else:
            parts.append([key, text])
    return parts


AUTO = ToolRules(names=NAMES)


@pytest.mark.parametrize(
    ("text", "shown", "calls"),
    [
        ("plain <text>", "plain <text>", []),
        (" \n ", " \n ", []),
        (ROME, "", [ROME_READ]),
        ("Sure. " + ROME, "Sure. ", [ROME_READ]),
        ("\n\n" + ROME + "\n", "", [ROME_READ]),
        (ROME + ROME, "", [ROME_READ] * 2),
        (f"First\n{ROME}\n then \n{ROME} done.", "First\n\n then \n done.", [ROME_READ] * 2),
        (ROME.replace("Rome", "the tag </tool_call> ends it"), "", [("weather", '{"city": "the tag </tool_call> ends it"}')]),
        (ROME.replace("Rome", "<tool_call>{}</tool_call>"), "", [("weather", '{"city": "<tool_call>{}</tool_call>"}')]),
        (ROME.replace("Rome", r"\"}}\\"), "", [("weather", r'{"city": "\"}}\\"}')]),
        (ROME.replace("Rome", "\\u00e8 è\\ud83d\\ude00"), "", [("weather", '{"city": "\\u00e8 è\\ud83d\\ude00"}')]),
        (ROME.replace("arguments", "parameters"), "", [ROME_READ]),
        ('<tool_call>{"arguments": {"a": [1, -2.5e3, null, {}]}, "name": "time"}', "", [("time", '{"a": [1, -2.5e3, null, {}]}')]),
        ('<tool_call>{"id": [{"x": 1}], "name": "time", "arguments": null}</tool_call>', "", [("time", "{}")]),
        ('<tool_call>{"name": "time", "arguments": "{\\"zone\\": \\"UTC\\"}"}</tool_call>', "", [("time", '{"zone": "UTC"}')]),
        ('<tool_call>{"name": "time"}', "", [("time", "{}")]),
        ('<tool_call>{"name": "time"}\n</tool_', "", [("time", "{}")]),
        ('<tool_call>{"name": "time"} </tool_call', "", [("time", "{}")]),
        ('<tool_call>{"name": "time"} and so on', " and so on", [("time", "{}")]),
        ('<tool_call>{"name": "time"}}\n</tool_call>', "}\n</tool_call>", [("time", "{}")]),
        ("text <tool_ca", "text <tool_ca", []),
    ],
)  # fmt: skip
def test_calls_and_text(text: str, shown: str, calls: list[tuple[str, str]]) -> None:
    assert read(AUTO, [text]) == (shown, calls) == read(AUTO, list(text))


@pytest.mark.parametrize(
    "text",
    [
        ROME.replace("weather", "ghost"),
        "<tool_call>no JSON</tool_call>",
        "<tool_call></tool_call>",
        '<tool_call>["name"]</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "time", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "time", "arguments": "Rome"}</tool_call>',
        '<tool_call>{"name": "time", "arguments": {"a": }}</tool_call>',
        '<tool_call>{"name": "time", "arguments": {"a": 01}}</tool_call>',
        '<tool_call>{"name": "time", "arguments": {"a": 1,}}</tool_call>',
        '<tool_call>{"name": "time", "arguments": {a: 1}}</tool_call>',
        '<tool_call>{"name": "time", "arguments": {"a": "\\x"}}</tool_call>',
        '<tool_call>{"name": "time", "arguments": {"a": "b\n"}}</tool_call>',
        '<tool_call>{"name": "time", "arguments": {"a": [1}}</tool_call>',
        '<tool_call>{"name": "time", "arguments": {"a": 1}\n</tool_call>',
        '<tool_call>{"name": "time", "arguments": {"a": "b',
        '<tool_call>{"name": "time", "arguments": {"a": tru',
        "<tool_call>{'name': 'time'}</tool_call>",
    ],
)
def test_what_is_no_call_is_shown_as_it_came(text: str) -> None:
    """And calls after it are calls."""
    for pieces in ([text], list(text)):
        assert read(AUTO, pieces) == (text, [])
    if text.endswith("</tool_call>"):
        assert read(AUTO, ["Hm. ", text, ROME]) == ("Hm. " + text, [ROME_READ])


def random_text(chooser: random.Random) -> tuple[str, str, list[tuple[str, str]]]:
    """(a text, what of it is to be shown, its calls)."""
    text, shown, calls = "", "", []
    blank = True  # nothing but white space since the last call
    for _ in range(chooser.randint(1, 5)):
        kind = chooser.choice(("text", "call", "call", "broken"))
        if kind == "text":
            part = chooser.choice(("Well, ", "a < b", "<tool", "</tool_call>", "é{}", "\n<tool_call ", '"'))
        elif kind == "broken":
            part = chooser.choice(('<tool_call>{"name": "time", "arguments": {"x": ]', "<tool_call>[]", '<tool_call>{"name": "nobody"}'))
        else:
            words = ("x", "</tool_call>", "<tool_call>", '"', "\\", "}{", "\n", "é😀", "")
            value = {
                chooser.choice("abc"): chooser.choice((1, -0.5, None, [True, {}], "".join(chooser.choices(words, k=3)))) for _ in range(2)
            }
            arguments = json.dumps(value, ensure_ascii=chooser.random() < 0.5, indent=chooser.choice((None, 2)))
            name, key = chooser.choice(sorted(NAMES)), chooser.choice(("arguments", "parameters"))
            body = [f'"name": "{name}"', f'"{key}" :{arguments}']
            chooser.shuffle(body)
            space = chooser.choice(("", " ", "\n"))
            text += f"<tool_call>{space}{{{', '.join(body)}}}{space}</tool_call>"
            calls.append((name, arguments))
            blank = True
            continue
        text, shown, blank = text + part, shown + part, False
    if not blank:
        return text, shown, calls
    return text + "\n", shown, calls


def test_every_way_to_cut_a_text_reads_the_same() -> None:
    """400 texts, each whole, in single characters, and cut at random twelve times: the same events, and those that the text was made of."""
    chooser = random.Random(7)
    for _ in range(400):
        text, shown, calls = random_text(chooser)
        reference = events(AUTO, [text])
        found, made = whole(reference)
        assert (found, [(call["function"]["name"], call["function"]["arguments"]) for call in made]) == (shown, calls), text
        cuts = [list(text)]
        for _ in range(12):
            at = sorted(chooser.sample(range(1, len(text)), min(len(text) - 1, chooser.randint(1, 8))))
            cuts.append([text[start:end] for start, end in zip([0, *at], [*at, len(text)], strict=True)])
        for pieces in cuts:
            assert joined(events(AUTO, pieces)) == joined(reference), pieces


@pytest.mark.parametrize("cut", [False, True])
def test_every_end_of_a_text_reads_the_same_however_it_was_cut(cut: bool) -> None:
    text = 'Now: <tool_call>\n{"name": "weather", "arguments": {"city": "Ro\\u006de", "days": [1, 2.5]}}\n</tool_call>\n' + ROME
    for length in range(len(text)):
        part = text[:length]
        assert joined(events(AUTO, list(part), cut=cut)) == joined(events(AUTO, [part], cut=cut))


def test_a_call_comes_as_it_is_written() -> None:
    """The first piece, with id and name, when the name is known; then every character of the arguments at once."""
    parser = choice_parser(AUTO, HERMES)
    assert parser.feed('Hi <tool_call>\n{"name": "weather') == [TextDelta(text="Hi ")]
    (first,) = parser.feed('", ')
    assert isinstance(first, CallDelta) and (first.index, first.name, first.arguments) == (0, "weather", "") and first.id
    assert parser.feed('"arguments": ') == []
    for piece in ('{"ci', 'ty"', ': "Ro', "me", '"}'):
        assert parser.feed(piece) == [CallDelta(index=0, arguments=piece)]
    assert parser.feed("}\n</tool_call>") == parser.finish(cut=False) == []


def test_a_call_that_was_cut_stays_and_one_that_broke_is_taken_back() -> None:
    begun = '<tool_call>{"name": "time", "arguments": {"zone": "U'
    assert read(AUTO, [begun], cut=True) == ("", [("time", '{"zone": "U')])
    assert read(AUTO, [begun], cut=False) == (begun, [])
    assert read(AUTO, [begun[:20]], cut=True) == (begun[:20], [])


def test_one_call_where_calls_are_not_parallel() -> None:
    rules = ToolRules(names=NAMES, parallel=False)
    other = ROME.replace("Rome", "Oslo")
    bad = "<tool_call>oops</tool_call>"
    for text, shown in ((f"a{ROME}b{other}c", "abc"), (f"{bad}{ROME}{other}{bad}", bad + bad), (ROME + other[:50], other[:50])):
        assert read(rules, [text]) == read(rules, list(text)) == (shown, [ROME_READ])
    assert read(rules, [ROME + other[:50]], cut=True) == ("", [ROME_READ])


def test_a_named_call_is_the_whole_text() -> None:
    rules = ToolRules(names=NAMES, named="time")
    for pieces in (['{"zone"', ': "UTC"}'], [" ", ' {"zone": ', "", '"UTC"}', "\n", " "], list('{"zone": "UTC"}')):
        assert read(rules, pieces) == ("", [("time", '{"zone": "UTC"}')])
    assert isinstance(choice_parser(rules, HERMES).feed("")[0], CallDelta), "with the first token, whatever it is"
    assert read(rules, [], cut=True) == ("", [("time", "")])


@pytest.mark.parametrize(
    ("text", "cut", "found"),
    [
        (' {"name": "weather", "arguments": {"city": "Rome"}}\n', False, ("", [ROME_READ])),
        ('{"name": "weather", "arguments": {"city": "Rome"', True, ("", [("weather", '{"city": "Rome"')])),
        ('{"name": "weather", "arguments": {"city": "Rome"', False, ('{"name": "weather", "arguments": {"city": "Rome"', [])),
        ('{"name": "ghost", "arguments": {}}', False, ('{"name": "ghost", "arguments": {}}', [])),
        ('{"na', True, ('{"na', [])),
        ("Sure. " + ROME, False, ("Sure. ", [ROME_READ])),
        (ROME + ROME, False, ("", [ROME_READ] * 2)),
        ("", False, ("", [])),
    ],
)
def test_a_required_call(text: str, cut: bool, found: Found) -> None:
    rules = ToolRules(names=NAMES, required=True)
    assert read(rules, [text], cut=cut) == read(rules, list(text), cut=cut) == found


def test_reading_takes_time_in_proportion_to_the_text() -> None:
    """Texts that begin a call at every step, 100 kB each: reading each call again to the end would take minutes."""
    for unit in (
        "<tool_call>",
        '<tool_call>{"',
        '<tool_call>{"name": "time", "arguments": {"',
        "<tool_call>{" + '"\\"' * 3,
        "<tool_call>" + ROME[:30],
    ):
        parser = HERMES(NAMES)
        text = unit * (100_000 // len(unit))
        found, _ = whole([*parser.feed(text), *parser.finish(cut=False)])
        assert found == text


def test_the_parser_of_every_model_is_in_the_table() -> None:
    assert TOOL_PARSER in TOOL_PARSERS
