"""Chat templates: messages in, prompt pieces out.

Owns the Jinja sandbox (immutable, no attribute access to Python, loop controls) and the rule that text from a request never becomes a
control token: where a string of a request contains the text of a special token, that text is masked while the template is rendered and
becomes plain text again afterwards. It never reads a file, and never renders a template that came with a request.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import jinja2
import msgspec
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from orchestrator.router.frontend.chat_messages import Message, Tool
from workers.protocol.errors import Rejected

#: Characters that a rendered prompt may have; four times what the largest body can hold.
MAX_RENDERED = 16 << 20

_TOOLS_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


class PromptPiece(msgspec.Struct, frozen=True):
    """A part of a prompt. ``exact``: the text is encoded as plain text; otherwise special tokens in it are encoded as such."""

    text: str
    exact: bool


class TemplateSource(msgspec.Struct, frozen=True, kw_only=True):
    """A template that came with a model, not yet compiled: to compile one may take as long as to render it."""

    source: str
    specials: tuple[str, ...]
    tokens: dict[str, str]

    def compile(self) -> ChatTemplate:
        """Raises jinja2.TemplateError."""
        return ChatTemplate(self.source, specials=self.specials, tokens=self.tokens)


class ChatTemplate:
    """One model's template, compiled. ``specials``: texts of the control tokens; ``tokens``: bos_token and such, given to the template."""

    def __init__(self, source: str, *, specials: Iterable[str], tokens: Mapping[str, str]) -> None:
        self._template = _environment().from_string(source)
        self._has_tools = "tools" in source
        self._tokens = dict(tokens)
        ordered = sorted((text for text in specials if text), key=len, reverse=True)
        special = "|".join(map(re.escape, ordered))
        self._special = re.compile(special or r"(?!)")
        self._hidden = re.compile(f"{special}|\ufdd0" if special else "\ufdd0")

    def render(
        self,
        messages: list[Message],
        *,
        tools: list[Tool] | None = None,
        add_generation_prompt: bool = True,
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[PromptPiece]:
        """The prompt as pieces in order: one piece, unless the request's text contains the text of a special token. Raises Rejected."""
        turns = [_turn(message) for message in messages]
        signatures = [msgspec.to_builtins(tool) for tool in tools or ()]
        if not self._has_tools:
            turns = _spell_out_tools(turns, signatures)
        given = {"messages": turns, "tools": signatures or None, **(kwargs or {})}
        mask = _Mask(self._hidden)
        masked = mask.hide(given)
        try:
            text = self._bounded(self._template.generate(add_generation_prompt=add_generation_prompt, **self._tokens, **masked))
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, OverflowError, RecursionError, MemoryError) as error:
            raise Rejected(f"messages: the chat template refused them: {str(error)[:200]}", param="messages") from None
        if not mask.hidden:
            return [PromptPiece(text, False)]
        return [piece for piece in self._unmask(text, mask) if piece.text]

    @staticmethod
    def _bounded(parts: Iterable[str]) -> str:
        """All parts joined. Raises Rejected as soon as they are too long together."""
        kept, size = [], 0
        for part in parts:
            size += len(part)
            if size > MAX_RENDERED:
                raise Rejected(f"messages: the rendered prompt has more than {MAX_RENDERED} characters", param="messages")
            kept.append(part)
        return "".join(kept)

    def _unmask(self, text: str, mask: _Mask) -> Iterable[PromptPiece]:
        end = 0
        for match in self._special.finditer(text):
            yield PromptPiece(mask.show(text[end : match.start()]), True)
            yield PromptPiece(match[0], False)
            end = match.end()
        yield PromptPiece(mask.show(text[end:]), True)


class _Mask:
    """Replaces the text of special tokens in a request's strings by placeholders that no template uses, and restores it after rendering."""

    def __init__(self, hidden: re.Pattern[str]) -> None:
        self._pattern = hidden
        self.hidden: list[str] = []

    def hide(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._pattern.sub(self._placeholder, value)
        if isinstance(value, dict):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.hide(item) for item in value]
        return value

    def show(self, text: str) -> str:
        return re.sub(r"\ufdd0(\d+)\ufdd1", lambda match: self.hidden[int(match[1])], text)

    def _placeholder(self, match: re.Match[str]) -> str:
        self.hidden.append(match[0])
        # Unicode reserves these noncharacters for a program's own use. If a request contains the first one, it is masked too.
        return f"\ufdd0{len(self.hidden) - 1}\ufdd1"


def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    # Templates expect the spacing of Python's json, and none of jinja's HTML escaping.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _turn(message: Message) -> dict[str, Any]:
    """A message in the form that templates expect: content as text, tool arguments as objects."""
    turn: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": message.text()}
    for key in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, key)) is not None:
            turn[key] = value
    if message.tool_calls:
        turn["tool_calls"] = [_call(call) for call in message.tool_calls]
    return turn


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": msgspec.json.decode(function["arguments"])}}
    except (msgspec.DecodeError, RecursionError):
        return call


def _spell_out_tools(turns: list[dict[str, Any]], signatures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tool signatures, calls and answers as message text, in the spelling that tool-trained models share, for a template without tools."""
    spelled = []
    for turn in turns:
        if calls := turn.get("tool_calls"):
            written = [f"<tool_call>\n{_to_json(call.get('function', {}))}\n</tool_call>" for call in calls]
            turn = {"role": "assistant", "content": "\n".join(filter(None, [turn["content"], *written]))}
        elif turn["role"] == "tool":
            turn = {"role": "user", "content": f"<tool_response>\n{turn['content']}\n</tool_response>"}
        spelled.append(turn)
    if not signatures:
        return spelled
    listing = _TOOLS_HEAD + "".join("\n" + _to_json(signature) for signature in signatures) + _TOOLS_TAIL
    if spelled[0]["role"] == "system":
        return [{**spelled[0], "content": f"{spelled[0]['content']}\n\n{listing}"}, *spelled[1:]]
    return [{"role": "system", "content": listing}, *spelled]
